"""Ten minutes of trouble: three training jobs on one cache, and all that can happen to them.

    python -m bench.chaos --minutes 10 --seed 1

starts a real S3 server behind a store that fails (`store`), a job of two ranks with each kind of workers (`jobs`), and
does to store, processes and disk what the seed says (`schedule`, `drive`, `damage`). Every batch is held against the
plan, and every sample's bytes against a digest (`oracle`). The status is 0 where nothing was lost, doubled, out of
order, damaged, hung or left behind; otherwise it prints what was, and the schedule up to there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from bench.chaos import damage, jobs
from bench.chaos.drive import Driver, Job
from bench.chaos.oracle import Data, Oracle
from bench.chaos.report import as_text
from bench.chaos.schedule import EVENTS, FAULTS, GAP, LIES, events
from bench.chaos.store import BadStoreProcess, Settings, Stored, certify
from fastload.cache.disk import take_inventory
from fastload.demo.weed import WeedServer
from fastload.store import StoreOptions, open_store
from fastload.store.types import ObjectInfo

BUCKET = "chaos"
SHARDS, SAMPLES_A_SHARD, SAMPLE_BYTES = 20, 33, 24_000
KINDS = ("thread", "process", "side")
_CACHE = {"ram_bytes": "8MiB", "disk_bytes": "10MiB", "chunk_bytes": "128KiB"}
_SMALL_DISK_BYTES = 20 << 20
_ENDING_S = 20.0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; what is under way is read to its end")
    parser.add_argument("--steps", type=int, default=1 << 60, help="end after so many steps of all jobs, if sooner")
    parser.add_argument("--seed", type=int, default=1, help="which schedule")
    parser.add_argument(
        "--gap", type=int, nargs=2, default=GAP, metavar="STEPS", help="between two events, at least and at most"
    )
    parser.add_argument("--share", type=float, default=0.08, help="of the requests fail")
    parser.add_argument("--stall-s", type=float, default=8.0, help="the longest silence of the store")
    parser.add_argument("--pace-s", type=float, default=0.05, help="the time of a trainer's step")
    parser.add_argument("--without", default="", help=f"kinds to leave out, by commas: {', '.join((*EVENTS, *FAULTS))}")
    parser.add_argument(
        "--jobs", default=",".join(KINDS), help=f"kinds of workers, by commas: {', '.join(KINDS)}, torch"
    )
    parser.add_argument(
        "--tmpfs", action="store_true", help="a cache on a tmpfs, which is really full at times; for root"
    )
    parser.add_argument(
        "--lies", action="store_true", help="the store also sends other bytes than it says; see the docs"
    )
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run that failed")
    parser.add_argument("--quiet", action="store_true", help="print the report only")
    options = parser.parse_args()
    options.without = set(filter(None, options.without.split(",")))
    if unknown := options.without - {*EVENTS, *FAULTS}:
        parser.error(f"--without {','.join(unknown)}: no such kind")
    options.jobs = options.jobs.split(",")
    return options


def main() -> int:
    """Run, print the report; the status."""
    options = parsed()
    damage.adopt_orphans()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fastload-chaos-"))
    report: dict[str, Any] = {}
    try:
        report = run(options, folder)
    finally:
        if not (options.keep and report.get("defects")):
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(as_text(report))
    return 1 if report["defects"] else 0


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one run."""
    began = time.monotonic()
    temporary = folder / "tmp"
    temporary.mkdir()
    shared_memory = set(os.listdir("/dev/shm"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        FASTLOAD_IDLE_S="1",
        FASTLOAD_CHAOS_TROUBLE=str(folder / "trouble"),
        PYTHONFAULTHANDLER="1",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent / "shim"), *_own_path()]),
        TMPDIR=str(temporary),
        OMP_NUM_THREADS="1",
        FASTLOAD_TRACEBACK="full",
    )

    def say(words: str) -> None:
        if not options.quiet:
            print(f"{time.monotonic() - began:7.1f} s  {words}", flush=True)

    with ExitStack() as stack:
        weed = stack.enter_context(WeedServer(folder / "weed"))
        damage.keep(weed.pid)
        data, objects = _upload(weed, folder / "objects")
        certificate, authority = certify(folder)
        kinds = tuple(kind for kind in FAULTS if kind not in options.without) + (tuple(LIES) if options.lies else ())
        settings = Settings(
            weed.endpoint_url, options.seed, options.share, kinds, options.stall_s, str(certificate), objects
        )
        store = BadStoreProcess(settings)
        stack.callback(store.close)
        damage.keep(store.pid)
        disk = damage.Disk(folder / "cache", folder / "trouble")
        if options.tmpfs:
            disk = damage.Disk(
                stack.enter_context(_small_disk(folder)) / "cache", folder / "trouble", folder / "disk" / "ballast"
            )
        multiprocessing.get_context("forkserver")
        multiprocessing.set_forkserver_preload(["bench.chaos.nursery"])
        all_jobs = [
            _job(kind, number, options, data, store, weed, disk, folder, authority)
            for number, kind in enumerate(options.jobs)
        ]
        driver = Driver(
            all_jobs,
            disk,
            events(options.seed, options.without, tuple(options.gap)),
            folder,
            refusals=lambda: store.faults().get("403", 0),
            lies=lambda: sum(store.faults().get(kind, 0) for kind in LIES),
            pace_s=options.pace_s,
            say=say,
        )
        try:
            driver.run(time.monotonic() + 60 * options.minutes, options.steps)
            store.quiet()
            driver.end()
        finally:
            driver.kill()
        _end_fork_server()
        left = _left_behind(folder, disk.directory, {weed.pid, store.pid}, shared_memory)
        driver.defects += left
        return {
            "seed": options.seed,
            "seconds": round(time.monotonic() - began, 1),
            "jobs": options.jobs,
            "steps": driver.steps,
            "samples": driver.samples,
            "epochs": {job.kind: job.target.epoch for job in all_jobs},
            "resumes": driver.resumes,
            "resizes": dict(driver.resized),
            "events": dict(driver.done),
            "faults": store.faults(),
            "failed_calls": disk.failed_calls,
            "requests": int(store.counters()["requests"]),
            "without": sorted(options.without),
            "defects": driver.defects,
            "schedule": driver.history if driver.defects else len(driver.history),
        }


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system with room for little more than the cache."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK_BYTES}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _own_path() -> list[str]:
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]


def _upload(weed: WeedServer, folder: Path) -> tuple[Data, tuple[Stored, ...]]:
    """Shards of samples whose bytes follow from their keys."""
    folder.mkdir()
    weed.make_bucket(BUCKET)
    keys, digests = [], {}
    for shard in range(SHARDS):
        names = [f"s{shard:02}/{sample:04}" for sample in range(SAMPLES_A_SHARD + shard % 3)]
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for number, name in enumerate(names):
                length = 1 + (number * 7919 + shard * 104729) % (2 * SAMPLE_BYTES)
                content = hashlib.shake_128(name.encode()).digest(length)
                digests[name] = jobs.digest_of(content)
                info = tarfile.TarInfo(f"{name}.bin")
                info.size = length
                tar.addfile(info, io.BytesIO(content))
        path = folder / f"{shard:04}.tar"
        path.write_bytes(archive.getvalue())
        weed.upload(path, f"s3://{BUCKET}/data/{path.name}")
        keys.append(tuple(names))
    options = StoreOptions.from_environment(environ=weed.environment())
    source = open_store(f"s3://{BUCKET}/data/", options)
    infos = tuple(source.list(f"s3://{BUCKET}/data/"))
    source.close()
    assert len(infos) == SHARDS
    return Data(infos, tuple(keys), digests), tuple(map(_stored, infos, sorted(folder.iterdir())))


def _stored(info: ObjectInfo, path: Path) -> Stored:
    modified = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(info.mtime_ns // 10**9))
    return Stored("/" + info.url.removeprefix("s3://"), str(path), str(info.etag), modified)


def _job(
    kind: str,
    number: int,
    options: argparse.Namespace,
    data: Data,
    store: BadStoreProcess,
    weed: WeedServer,
    disk: damage.Disk,
    folder: Path,
    authority: Path,
) -> Job:
    """Each has another way to the store: TLS, plain HTTP, and through the client library, which reads where a time
    limit is given. They read the same data, each in an order of its own.
    """
    storage: dict[str, Any] = {
        "endpoint_url": store.url,
        "key": weed.access_key_id,
        "secret": weed.secret_access_key,
        "region": "us-east-1",
    }
    if number % 3 == 0:
        storage |= {"endpoint_url": store.tls_url, "root_certificate": authority.read_text()}
    elif number % 3 == 2:
        storage |= {"read_timeout": "5s"}
    seed = 100 * options.seed + number

    def make(rank: int, world_size: int, state: Mapping[str, Any] | None) -> jobs.Rank:
        traces = str(folder / f"traces-{kind}-{rank}")
        urls = f"s3://{BUCKET}/data/"
        cache = {"directory": str(disk.directory), **_CACHE}
        return jobs.Rank(kind, rank, world_size, urls, cache, storage, seed, "", state, traces)

    return Job(kind, Oracle(data, seed), make, has_group=number % 3 == 0)


def _end_fork_server() -> None:
    """That of `multiprocessing`, and its resource tracker: they would stay as long as this process."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def _left_behind(folder: Path, cache: Path, expected: set[int | None], shared_memory: set[str]) -> list[str]:
    """Processes, temporary files and shared memory that outlive the jobs."""
    deadline = time.monotonic() + _ENDING_S
    while True:
        damage.reap()
        ours = damage.descendants(os.getpid()) - expected
        found = [f"left behind: process {pid}: {damage.command_of(pid)[:300]}" for pid in ours]
        found += [f"left behind: {path}" for path in (folder / "tmp").iterdir() if "pymp" not in path.name]
        take_inventory(
            cache
        )  # as the next service does: where calls fail, the removal of a temp file may have been one
        found += [f"left behind: {path}" for path in cache.rglob(".tmp-*")]
        found += [f"left behind: {path}" for path in cache.rglob("*") if path.is_socket()]
        new = set(os.listdir("/dev/shm")) - shared_memory
        found += [f"left behind: /dev/shm/{name}" for name in new if _is_ours(name)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _is_ours(name: str) -> bool:
    return name.startswith(("fastload", "torch_"))


if __name__ == "__main__":
    sys.exit(main())
