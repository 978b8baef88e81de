"""Whether the verdict of `fastload bench` names what limits a run: nine runs, each of them bound by one cause.

    python -m bench.causes                       # each ten times: half an hour on two cores
    python -m bench.causes --times 1 --case link memory

A run reads little data from a real S3 server behind the proxy, which makes the link narrow, the store far away or the
store refuse; a service that reads its disk slowly, a function that sleeps, an arena of fewer buffers than a window has
shards, a single shard and a slow accelerator are what they are. Rates are low, so that no core is the limit unless
decoding is meant. Status 1 where a verdict is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import data
from bench.proxy import Profile, Proxy
from fastload.bench.plan import Options
from fastload.bench.session import Session
from fastload.bench.workloads import Workload, write_shard
from fastload.demo.weed import WeedServer

BUCKET = "bench"
MB = 1_000_000
# What is measured in no case: everything else that a case does not need.
_NEVER = frozenset({"memory", "shares", "prediction"})
_EPOCH = _NEVER | {"disk", "decode", "ram", "disk epoch", "demand"}
# Samples that are noise, and the shards that they are in: of 4 MB, many and few of 200 kB, and one of all.
IMAGES = Workload("images", 20_000, 5_000, 3_000, 64, 0.0, 0.0)
DATA: Mapping[str, tuple[int, int]] = {
    "plain": (3_000, 15),
    "small": (3_000, 300),
    "few": (400, 40),
    "single": (1_500, 1),
}
_SLOW_DISK = "0 0 0 4e6"  # no errors, no delay, and bytes a second of each read
SLEEP_S = 0.004


@dataclass(frozen=True, slots=True)
class Case:
    """A run, and the words of the verdict that are right."""

    name: str
    data: str
    profile: Profile
    says: str
    skip: frozenset[str] = _EPOCH
    options: Mapping[str, Any] = field(default_factory=dict)
    has_slow_disk: bool = False


NEAR = Profile(delay_s=0.002)
CASES = (
    Case("link", "plain", Profile(0.01, 15 * MB), "the link limits it", _EPOCH),
    # The arena has a buffer for each of the small shards; else it would be what the run is bound by.
    Case("latency", "small", Profile(0.4), "latency limits it", _EPOCH, {"ram_bytes": 4 << 30}),
    Case("throttling", "plain", Profile(0.01, 15 * MB, refuse_every=8), "throttling limits it", _EPOCH),
    Case(
        "disk",
        "plain",
        NEAR,
        "and the disk limits it",
        _EPOCH - {"disk", "disk epoch"},
        {"ram_bytes": 64 << 20},
        has_slow_disk=True,
    ),
    Case(
        "decode",
        "photographs",
        NEAR,
        "decoding limits it",
        _EPOCH - {"decode"},
        {"decode": {"jpg": "image:224", "cls": "integer"}, "batch_size": 64},
    ),
    Case("map", "plain", NEAR, "It is map-bound", _EPOCH, {"functions": ["bench.causes:sleeps"]}),
    # A window that is too large for the arena is made smaller, in bytes; but each of its shards takes a buffer.
    Case("memory", "few", Profile(0.2), "It is memory-bound", _EPOCH, {"ram_bytes": 64 << 20}),
    Case("shards", "single", NEAR, "There is only 1 shard for 2 workers", _EPOCH),
    Case(
        "consumer",
        "plain",
        NEAR,
        "the consumer limits it, and the loader keeps up",
        _EPOCH - {"demand"},
        {"step_s": 0.2},
    ),
)


def sleeps(sample: dict[str, Any]) -> dict[str, Any]:
    """A function given to `map` that takes its time, and no core."""
    time.sleep(SLEEP_S)
    return sample


class Place:
    """A server with the data, and a folder for caches; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._there: set[str] = set()

    def __enter__(self) -> Place:
        with ExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="causes-", dir=self._folder))
            self._work = Path(name)
            self._server = stack.enter_context(WeedServer(self._work / "store"))
            self._server.make_bucket(BUCKET)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, case: Case) -> list[str]:
        """The verdict on a case."""
        self._upload(case.data)
        with Proxy(self._server.endpoint_url, case.profile) as proxy, _environment(self._variables(case, proxy.url)):
            options = Options(
                urls=[f"s3://{BUCKET}/{case.data}/"],
                cache=self._work / "cache",
                max_bytes=1 << 40,
                skip=case.skip,
                **{"batch_size": 32, **case.options},
            )
            with Session(options, ["bench.causes", case.name], lambda words: None) as session:
                session.plan()
                result = session.run()
        failed = [f"{phase.name} failed: {phase.error}" for phase in result.phases if phase.error]
        return failed + result.verdict

    def _variables(self, case: Case, url: str) -> dict[str, str]:
        variables = {**self._server.environment(), "AWS_ENDPOINT_URL": url, "FASTLOAD_IDLE_S": "0"}
        if case.has_slow_disk:
            trouble = self._work / "trouble"
            trouble.write_text(_SLOW_DISK)
            here = Path(__file__).parent
            paths = [str(here / "chaos" / "shim"), str(here.parent)]
            variables |= {"FASTLOAD_CHAOS_TROUBLE": str(trouble), "PYTHONPATH": os.pathsep.join(paths)}
        return variables

    def _upload(self, name: str) -> None:
        if name in self._there:
            return
        if name == "photographs":
            paths = data.prepare(self._folder, shard_count=4).paths
        else:
            paths = list(_shards(self._work / name, *DATA[name]))
        for path in paths:
            self._server.upload(path, f"s3://{BUCKET}/{name}/{path.name}")
        self._there.add(name)


def _shards(folder: Path, count: int, shard_count: int) -> Iterator[Path]:
    folder.mkdir()
    for number in range(shard_count):
        path = folder / f"{number:04d}.tar"
        write_shard(path, IMAGES, range(count * number // shard_count, count * (number + 1) // shard_count))
        yield path


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within the block these are set, and afterwards all is as before."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, and count the verdicts that are right."""
    parser = argparse.ArgumentParser(prog="bench.causes", description=(__doc__ or "").partition("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", type=Path, default=data.default_folder())
    options = parser.parse_args(arguments)
    wrong = 0
    with Place(options.folder) as place:
        for case in CASES:
            if case.name not in options.case:
                continue
            found = [place.run(case) for _ in range(options.times)]
            right = sum(case.says in " ".join(said) for said in found)
            print(f"{case.name:12} {right} of {options.times} right", flush=True)
            print(f"  {found[0][0]}")
            for said in found:
                if case.says not in " ".join(said):
                    wrong += 1
                    print("  wrong:", *said, sep="\n    ", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
