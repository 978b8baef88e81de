"""A job that saves checkpoints and is killed, again and again: what was promised must be there.

    python -m bench.kills                        # 300 kills: about half an hour
    python -m bench.kills --count 20 --seed 7    # a look

A trainer saves step after step to a real S3 server, each as safe as chance says (`until`), and says so. At a random
moment it is killed with SIGKILL, or the cache service of its node is, or both. The next trainer starts as a user's
would: it loads the newest step, and goes on from there. Held against what was said:

*lost*: the step that is loaded is older than the newest that was said to be safe: in memory, where the trainer was
killed and the service not since; on disk or in the store, whatever was killed.
*torn*: a step that is listed and cannot be loaded, or whose bytes are not those of its number.
*stuck*: nothing moved for two minutes.
*left over*: after the last one other objects in the store than those of steps that are kept, or processes.

The status is 1 where there was any of it. What is killed, and after how long, follows from the seed; where in a save
that is does not.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fastload import Cache, CheckpointError, ObjectMissingError, checkpoint
from fastload.bench import measure
from fastload.checkpoint.attempts import opened
from fastload.checkpoint.inventory import rows
from fastload.demo.weed import REGION, WeedServer
from fastload.protocol import LEVELS, Level

URL = "s3://kills/run"
VICTIMS = ("trainer", "service", "both")
_COUNT = 4 << 20  # of float32 in a state: 16 MiB
_STUCK_S = 120.0
_LIFE_S = 1.5  # at most, from the first word of a trainer to the next kill
_MAY_BE = ("committed", "remains")
_CACHE: dict[str, Any] = {"ram_bytes": "8MiB", "disk_bytes": "8MiB", "chunk_bytes": "128KiB"}


def run_in(cache: Cache, *, dedup: bool = False) -> checkpoint.Run:
    """The run that is saved."""
    return checkpoint.Run(URL, keep=checkpoint.Keep(last=2, every=10), dedup=dedup, cache=cache)


def state_of(step: int) -> dict[str, Any]:
    """What a trainer has at that step."""
    return {"step": step, "w": torch.arange(_COUNT, dtype=torch.float32) + step, "b": torch.full((7,), step)}


def checked(state: dict[str, Any]) -> int:
    """The step of a state all bytes of which are those that were saved; ValueError where they are not."""
    step = int(state["step"])
    for name, tensor in state_of(step).items():
        if name != "step" and not torch.equal(state[name], tensor):
            raise ValueError(f"{name} of step {step} is not what was saved")
    return step


def train(directory: Path, seed: int) -> None:
    """Go on from the newest step, and save until killed. Says `loaded STEP`, and of each step how safe it is:
    `memory STEP`, `disk STEP`, `store STEP`.
    """
    faulthandler.enable()
    pick = random.Random(seed)
    run = run_in(Cache(directory, **_CACHE), dedup=bool(seed % 2))
    step = 0
    with contextlib.suppress(ObjectMissingError):  # in the beginning
        step = checked(run.load(wait_s=_STUCK_S / 2))
    print("loaded", step, flush=True)
    while True:
        step += 1
        level: Level = pick.choice(LEVELS)
        saving = run.save(step, state_of(step), until=level)
        print(level, step, flush=True)
        if saving is not None and level == "memory" and pick.random() < 0.3:
            saving.wait("disk")
            print("disk", step, flush=True)


class Trainer:
    """One process of `train`, and what it has said."""

    def __init__(self, directory: Path, seed: int) -> None:
        command = [sys.executable, "-m", "bench.kills", "--train", str(directory), "--seed", str(seed)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=measure.die_with_parent
        )
        self._changed = threading.Condition()
        self._said: list[tuple[str, int]] = []
        self._ended, self._errors = False, ""
        self._readers = [threading.Thread(target=each) for each in (self._listen, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @property
    def said(self) -> list[tuple[str, int]]:
        with self._changed:
            return list(self._said)

    def wait(self, count: int) -> None:
        """Until it has said so much; `RuntimeError` where it does not, or has ended."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._said) >= count or self._ended, _STUCK_S):
                self._process.send_signal(signal.SIGABRT)  # prints where its threads are
                self._readers[1].join()
                raise RuntimeError(
                    f"stuck: nothing was said for {_STUCK_S:g} s after {self._said[-1:]}:\n{self._errors}"
                )
            if len(self._said) < count:
                self._readers[1].join()
                raise RuntimeError(f"a trainer ended by itself:\n{self._errors}")

    def kill(self) -> None:
        """And read what it has said until then."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    @property
    def damages(self) -> list[str]:
        """Steps that it could not load, of one that was killed."""
        return [line for line in self._errors.splitlines() if "cannot be loaded" in line]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, step = line.split()
            with self._changed:
                self._said.append((what, int(step)))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors = self._process.stderr.read()


class Promises:
    """What must be there after a kill."""

    def __init__(self) -> None:
        self._durable = 0  # said to be on disk, or in the store
        self._in_memory = 0  # said to be in the memory of the service that is there

    def heard(self, said: list[tuple[str, int]]) -> None:
        """What a trainer has said since the last kill."""
        for what, step in said:
            if what == "memory":
                self._in_memory = max(self._in_memory, step)
            else:
                self._durable = max(self._durable, step)

    def service_killed(self) -> None:
        """A trainer that lives does again what was in memory only; one that is killed before that cannot."""
        self._in_memory = 0

    @property
    def newest(self) -> int:
        """The step that a trainer which starts now must find, or a newer one."""
        return max(self._durable, self._in_memory)


def torment(directory: Path, count: int, seed: int) -> list[str]:
    """Kill `count` times; what was wrong."""
    pick, promises, found = random.Random(seed), Promises(), list[str]()
    kills: Counter[str] = Counter()
    trainer, heard = Trainer(directory, seed), 0
    try:
        for number in range(count):
            trainer.wait(heard + 1)  # after a kill of the service it goes on, too
            time.sleep(pick.uniform(0, _LIFE_S))
            victim = pick.choice(VICTIMS)
            kills[victim] += 1
            if victim != "service":
                trainer.kill()
                found += [f"torn: {line}" for line in trainer.damages]
            if victim != "trainer":
                kill_service(directory)
            said = trainer.said
            promises.heard(said[heard:])
            if victim != "trainer":
                promises.service_killed()
            heard = len(said)
            if victim != "service":
                trainer, heard = Trainer(directory, seed + number + 1), 1
                trainer.wait(1)
                loaded = trainer.said[0][1]
                if loaded < promises.newest:
                    found.append(f"lost: step {promises.newest}; {loaded} is there after kill {number} ({victim})")
                print(f"{number + 1:4} {victim:8} promised {promises.newest:5}, loaded {loaded:5}", flush=True)
    except RuntimeError as error:
        found.append(str(error))
    finally:
        trainer.kill()
    print(", ".join(f"{count} times {victim}" for victim, count in kills.items()))
    return found + left_over(directory)


def kill_service(directory: Path) -> None:
    """SIGKILL, to all of the directory's, which may be none at the moment."""
    for pid in measure.find_processes("fastload.service", f"--directory={directory}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def left_over(directory: Path) -> list[str]:
    """What is wrong after the last kill, once a job has come and gone that was not killed."""
    found = []
    with Cache(directory, **_CACHE) as cache:
        run = run_in(cache)
        run.load(wait_s=_STUCK_S / 2)
        for step in run.steps():
            try:
                if checked(run.load(step=step)) != step:
                    found.append(f"torn: step {step} is another one")
            except (CheckpointError, ValueError) as error:
                found.append(f"torn: {error}")
        for _ in range(2):  # the plan of a save that failed goes before the rest
            run.prune(grace_s=0)
    with opened(URL, None) as place:
        # What remains of a step that was let go is what others refer to.
        found += [f"left over: {row.name}, {row.state}" for row in rows(place) if row.state not in _MAY_BE]
    deadline = time.monotonic() + _STUCK_S
    while services := measure.find_processes("fastload.service", f"--directory={directory}"):
        if time.monotonic() > deadline:
            return [*found, f"left over: service {services}"]
        time.sleep(0.1)
    return found


def main() -> None:
    """Kill, and print what was wrong; the status is 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(options.train, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="fastload-kills-") as folder, WeedServer(f"{folder}/store") as weed:
        weed.make_bucket("kills")
        os.environ.update(
            AWS_ACCESS_KEY_ID=weed.access_key_id,
            AWS_SECRET_ACCESS_KEY=weed.secret_access_key,
            AWS_ENDPOINT_URL=weed.endpoint_url,
            AWS_REGION=REGION,
        )
        found = torment(Path(folder, "cache"), options.count, options.seed)
    print("\n".join(found) or "nothing was lost, torn, stuck or left over")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
