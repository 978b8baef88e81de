"""Damaged inputs by the thousand, for readers that must stand any: by hand or by `make fuzz`, a little by the tests.

A reader runs in a process of its own, since it may die of what it reads. Code that numba compiles cannot be built with
a sanitizer of addresses, so two other things stand in for one, each in a process:
- *bounds*: numba checks every index against its array (NUMBA_BOUNDSCHECK=1), and a wrong one is an error;
- *pages*: what trains people's models, compiled as always. Every array that the reader is given or makes ends where a
  page begins that nobody may touch, or begins where one ends, so that what reads or writes past it dies there. What an
  array holds at first is noise, so that who relies on it is found out by what comes of it.
A case is a number: all that is random in it comes from there. It has a few seconds, or it is hanging.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

FOUND = Path(__file__).parent / "found"
MODES = {"bounds": {"NUMBA_BOUNDSCHECK": "1"}, "pages": {"NUMBA_BOUNDSCHECK": "0"}}
_HANGS_S = 20
_PAGE = mmap.PAGESIZE
_NUMBER_BYTES = 8

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOBODY = 0  # PROT_NONE


@dataclass(frozen=True)
class Target:
    """A reader. `make` makes damaged input; `check` reads it, and raises where that goes wrong, but for the errors that
    such input is meant to end in. Both take all that is random from where they are told. `modes`: both above, where
    there is compiled code.
    """

    name: str
    make: Callable[[random.Random], bytes]
    check: Callable[[bytes, random.Random], None]
    modes: tuple[str, ...] = tuple(MODES)


def guarded(count: int, dtype: npt.DTypeLike, at_end: bool, noise: int = 0xA5) -> npt.NDArray[Any]:
    """An array of `count`, full of `noise`; the page behind it, or before it, belongs to nobody."""
    nbytes = count * np.dtype(dtype).itemsize
    inner = max(1, -(-nbytes // _PAGE)) * _PAGE
    memory = mmap.mmap(-1, inner + 2 * _PAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[_PAGE : _PAGE + inner] = noise
    for page in (0, _PAGE + inner):
        if _mprotect(whole.ctypes.data + page, _PAGE, _NOBODY):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = _PAGE + (inner - nbytes if at_end else 0)
    return np.ndarray(count, dtype, memory, start)


class Guarding:
    """numpy for a module under test, whose new arrays are guarded."""

    def __init__(self, rng: random.Random) -> None:
        self._at_end, self._noise = rng.random() < 0.7, rng.randrange(256)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return guarded(math.prod(np.atleast_1d(shape).tolist()), dtype, self._at_end, self._noise).reshape(shape)

    def full(self, shape: int | tuple[int, ...], value: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        made = self.empty(shape, dtype)
        made[...] = value
        return made

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return self.full(shape, 0, dtype)

    def empty_like(self, other: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self.empty(len(other), other.dtype)

    def concatenate(self, arrays: Any) -> npt.NDArray[Any]:
        return self.array(np.concatenate(arrays))

    def array(self, values: Any, dtype: npt.DTypeLike = None) -> npt.NDArray[Any]:
        plain = np.array(values, dtype)
        made = self.empty(len(plain), plain.dtype)
        made[:] = plain
        return made


def run_case(target: Target, number: int) -> None:
    """Raises where the reader is wrong; does not come back where it dies or hangs."""
    data = target.make(random.Random(number))
    target.check(data, random.Random(~number))


def run_cases(target: Target, first: int, seconds: float, log: Path) -> None:
    """Cases from `first` on, for so long; `log` always holds the number of the one under way."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also from within compiled code
    descriptor = os.open(log, os.O_WRONLY)
    until = time.monotonic() + seconds
    number = first
    while time.monotonic() < until:
        os.pwrite(descriptor, number.to_bytes(_NUMBER_BYTES, "little"), 0)
        signal.alarm(_HANGS_S)
        run_case(target, number)
        number += 1


def main(module: str, *targets: Target) -> None:
    """The command line of a module with these targets; what is found goes to tests/formats/found and into the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for all targets and modes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="so many of each target in this process, and nothing kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        target = next(target for target in targets if target.name == options.child)
        run_cases(target, options.first, options.seconds, options.log)
        return
    if options.cases is not None:
        for target, number in product(targets, range(options.cases)):
            run_case(target, (options.seed << 32) + number)
        return
    runs = [(target, mode) for target in targets for mode in target.modes]
    found = sum(_hunt(module, target, mode, options.seed, options.seconds / len(runs)) for target, mode in runs)
    raise SystemExit(found > 0)


def _hunt(module: str, target: Target, mode: str, seed: int, seconds: float) -> int:
    """Run cases for so long; how many were bad."""
    until = time.monotonic() + seconds
    number, done, found = seed << 32, 0, 0
    with tempfile.TemporaryDirectory(prefix="fastload-fuzz-") as folder:
        log = Path(folder) / "number"
        while (left := until - time.monotonic()) > 0:
            log.write_bytes(number.to_bytes(_NUMBER_BYTES, "little"))
            command = [sys.executable, "-m", module, "--child", target.name, "--first", str(number), "--log", str(log)]
            child = subprocess.run(
                [*command, "--seconds", str(left)],
                env={**os.environ, **MODES[mode]},
                capture_output=True,
                text=True,
                check=False,
            )
            bad = int.from_bytes(log.read_bytes(), "little")
            done += bad - number + 1
            if child.returncode == 0:
                break
            found += 1
            number = bad + 1
            print(f"{target.name}, {mode}, case {bad}: {_how_it_ended(child)}", flush=True)
            print(f"  kept as {_keep(target, bad)}", flush=True)
    print(f"{target.name}, {mode}: {done} cases, {found} bad", flush=True)
    return found


def _how_it_ended(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return "it hangs" if name == "SIGALRM" else f"it died of {name}"
    return "\n".join(child.stderr.splitlines()[-12:])


def _keep(target: Target, number: int) -> Path:
    data = target.make(random.Random(number))
    path = FOUND / target.name / xxhash.xxh3_64_hexdigest(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
