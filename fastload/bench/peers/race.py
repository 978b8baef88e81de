"""Loaders take turns over the same samples: an epoch with an empty cache, one after it, and one with no page cache.

Each turn is two processes over one folder. The first reads two epochs: from the store, with an empty cache; and again,
out of RAM, which for ours is the arena and for the others the page cache of their own cache, which nothing bounds. Then
the page cache is dropped, and the second process reads one epoch from the disk, ours with a small arena. What reads
other formats than tar gets its data on this machine, converted beforehand from copies of the shards, which takes its
time and is a figure; its first epoch is from a dropped page cache.

A loader that is not installed, fails, or has not ended after many times as long as ours, is a line, and has no more
turns.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from fastload.bench import measure
from fastload.bench.peers import OURS, module
from fastload.bench.peers.job import About, Answer, Job, Reading, Request, is_local, samples_of
from fastload.bench.peers.order import DISTANCE_PERFECT, Seen, Stored, seen
from fastload.bench.process import Words, answers, asked
from fastload.bench.schema import Better, Figure, Phase, Result
from fastload.bench.verdict import Beside
from fastload.config import format_bytes
from fastload.errors import ConfigError, FastloadError, ShardError
from fastload.redaction import redact
from fastload.store import ObjectInfo, StoreOptions, open_store, store_root

PREFIX = "peer "
EPOCHS = ("first epoch", "later epoch, from RAM", "later epoch, page cache dropped")
_READ_BYTES = 8 << 20
# A loader may take so many times as long as ours, and half a minute more, before it counts as hung.
_TIMES_OURS, _LEAST_S = 20.0, 60.0
_SHORT_S = 2.0


def passes(names: Sequence[str], repeats: int) -> float:
    """How often the shards are read from the store: ours and caches once a turn, what has no cache three times."""
    if not names:
        return 0.0
    abouts = [_about(name) for name in names]
    copies = any(about.reads != "shards" for about in abouts)
    each = [3 if not about.caches else 1 for about in abouts if about.reads == "shards"]
    return 1.0 + repeats * (1 + sum(each)) if copies or each else 0.0


@dataclass(slots=True)
class _Entry:
    """One loader's turns so far."""

    name: str
    about: About
    source: str = ""
    seconds: float = 0.0
    converted_s: float = 0.0
    converted_bytes: int = 0
    colds: list[Reading] = field(default_factory=list)
    warms: list[Reading] = field(default_factory=list)
    dropped: list[Reading] = field(default_factory=list)
    seens: list[Seen] = field(default_factory=list)
    error: str = ""


class Race:
    """Turns of `names` and ours. `job` names the shards and what to do with samples; its folder is not used."""

    def __init__(
        self,
        names: Sequence[str],
        objects: Sequence[ObjectInfo],
        job: Job,
        folder: Path,
        *,
        store_options: StoreOptions,
        repeats: int,
        arena_least: int,
        timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        self._objects, self._job, self._folder = objects, job, folder
        self._store_options, self._repeats, self._arena_least = store_options, repeats, arena_least
        self._timeout_s, self._report = timeout_s, report
        self._entries = [_Entry(name, _about(name)) for name in (OURS, *dict.fromkeys(names))]
        self._shards: list[Path] = []
        self._stored = Stored.of([])
        self._payload_bytes = 0
        self._byte_count = sum(each.size for each in objects)

    def run(self) -> None:
        """All turns. Raises what keeps all loaders from being measured; `phases()` has what was measured until then."""
        self._check_format()
        self._check_room()
        self._copy_shards()
        self._look_at_samples()
        for entry in self._entries:
            self._prepare(entry)
        for number in range(self._repeats):
            start = number % len(self._entries)
            for entry in (*self._entries[start:], *self._entries[:start]):
                if not entry.error:
                    self._report(f"{entry.name} ({number + 1} of {self._repeats})")
                    self._turn(entry)

    def phases(self) -> list[Phase]:
        """One for each loader that had a turn, or failed."""
        return [self._phase(entry) for entry in self._entries if entry.colds or entry.error]

    # Before the turns

    def _check_format(self) -> None:
        for info in self._objects:
            if not info.url.endswith(".tar") or info.packing:
                raise ConfigError(
                    f"--peers compares loaders over tar shards, and {info.url} is none; give your own loader of this "
                    "data with --against MODULE:FUNCTION"
                )

    def _check_room(self) -> None:
        formats = {entry.about.reads for entry in self._entries} - {"shards", "copies"}
        needed = int((2.2 + len(formats)) * self._byte_count)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise FastloadError(
                f"{self._folder} has {format_bytes(free)} free, and other loaders need {format_bytes(needed)} for "
                "copies, formats and caches; give a smaller --max-bytes"
            )

    def _copy_shards(self) -> None:
        """Copies on this machine, for what converts them and for the order that samples are stored in."""
        urls = [each.url for each in self._objects]
        if all(map(is_local, urls)):
            self._shards = [Path(url) for url in urls]
            return
        folder = self._folder / "copies"
        folder.mkdir()
        buffer = memoryview(bytearray(_READ_BYTES))
        with contextlib.ExitStack() as stack:
            stores = {
                root: stack.enter_context(contextlib.closing(open_store(root, self._store_options)))
                for root in {store_root(url): None for url in urls}
            }
            for number, info in enumerate(self._objects):
                self._report(f"copying shards for other loaders ({number + 1} of {len(self._objects)})")
                path = folder / f"{number:06d}.tar"
                with path.open("wb") as file:
                    for start in range(0, info.size, _READ_BYTES):
                        part = buffer[: min(_READ_BYTES, info.size - start)]
                        stores[store_root(info.url)].read_into(info, start, part)
                        file.write(part)
                self._shards.append(path)

    def _look_at_samples(self) -> None:
        """Columns, keys and sizes of what is stored."""
        self._report("samples of the shards")
        keys: list[list[str]] = []
        for info, path in zip(self._objects, self._shards, strict=True):
            keys.append([])
            try:
                for sample in samples_of(str(path)):
                    keys[-1].append(sample.pop("__key__"))
                    self._job.columns = self._job.columns or list(sample)
                    self._payload_bytes += sum(
                        len(sample.get(name, b"")) for name in self._job.columns if name not in self._job.decode
                    )
            except tarfile.TarError as error:
                raise ShardError(f"{info.url} cannot be read by Python's tarfile: {error}; write it again") from error
        self._stored = Stored.of(keys)
        if not self._stored.samples:
            raise ConfigError("the shards have no samples")
        for name in self._job.decode:
            if name not in self._job.columns:
                raise ConfigError(f"--decode {name}: there is no such column; there are {', '.join(self._job.columns)}")

    def _prepare(self, entry: _Entry) -> None:
        """Whether it is installed; and its data in its own format."""
        for name in entry.about.distributions:
            if _version(name) is None:
                entry.error = f"{name} is not installed: pip install 'fastload[bench]'"
                return
        if entry.about.reads in ("shards", "copies"):
            return
        self._report(f"{entry.name}: converting")
        folder = self._folder / entry.about.reads
        shards = [str(path) for path in self._shards]
        request = Request(peer=entry.name, shards=shards, columns=self._job.columns, folder=str(folder))
        try:
            entry.converted_s = ask(request, self._folder, self._timeout_s).seconds
        except (FastloadError, OSError) as error:
            entry.error = f"converting: {redact(str(error))}"
            return
        entry.source = str(folder)
        entry.converted_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    # Turns

    def _turn(self, entry: _Entry) -> None:
        folder = self._folder / "turn"
        began = time.monotonic()
        try:
            folder.mkdir()
            job = msgspec.structs.replace(self._job, folder=str(folder), source=entry.source)
            if entry.about.reads == "copies":
                job.urls = [str(path) for path in self._shards]
            self._drop(entry, folder)
            cold, warm = self._read(entry, job, [0, 1])
            self._drop(entry, folder)
            (dropped,) = self._read(entry, msgspec.structs.replace(job, ram_bytes=self._arena_least), [2])
        except (FastloadError, OSError) as error:
            entry.error = redact(str(error))
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            entry.seconds += time.monotonic() - began
        entry.colds.append(cold)
        entry.warms.append(warm)
        entry.dropped.append(dropped)
        entry.seens += [seen(self._stored, each.keys, each.batch_sizes) for each in (cold, warm, dropped)]

    def _drop(self, entry: _Entry, folder: Path) -> None:
        measure.drop_page_cache([folder, *([Path(entry.source)] if entry.source else self._shards)])

    def _read(self, entry: _Entry, job: Job, epochs: list[int]) -> list[Reading]:
        request = Request(peer=entry.name, job=job, epochs=epochs)
        readings = ask(request, self._folder, self._deadline_s(entry)).epochs
        for reading in readings:
            if reading.payload_bytes not in (None, self._payload_bytes):
                raise FastloadError(
                    f"its samples have {reading.payload_bytes:,} bytes, and {self._payload_bytes:,} are stored"
                )
        return readings

    def _deadline_s(self, entry: _Entry) -> float:
        ours = self._entries[0]
        if entry is ours or not ours.colds:
            return self._timeout_s
        slowest = max(each.seconds for each in (*ours.colds, *ours.warms, *ours.dropped))
        return min(self._timeout_s, _LEAST_S + _TIMES_OURS * slowest)

    # What came of them

    def _phase(self, entry: _Entry) -> Phase:
        about = entry.about
        phase = Phase(name=f"{PREFIX}{entry.name}", seconds=entry.seconds + entry.converted_s, error=entry.error)
        versions = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in about.distributions)
        phase.notes = [f"{versions}, set up as {about.documentation} has it", *about.notes]
        if about.reads == "copies":
            phase.notes.append("reads copies of the shards on this machine, and not the store")
        elif about.reads != "shards":
            phase.notes.append(f"reads {about.reads} on this machine, converted from the shards, and not the store")
        elif not about.caches:
            phase.notes.append("has no cache: each epoch reads the store")
        if not entry.colds:
            return phase
        per_s = self._stored.samples
        gb = self._byte_count / 1e9
        both = list(zip(entry.colds, entry.warms, entry.dropped, strict=True))

        def figure(name: str, unit: str, values: list[float], better: Better = "", *, steady: bool = False) -> None:
            phase.figures.append(Figure(name=name, unit=unit, values=values, better=better, steady=steady))

        for name, readings in zip(EPOCHS, (entry.colds, entry.warms, entry.dropped), strict=True):
            figure(name, "samples/s", [per_s / each.seconds for each in readings], "more")
        figure("first epoch, bytes", "B/s", [self._byte_count / each.seconds for each in entry.colds], "more")
        figure("first batch", "s", [each.first_batch_s for each in entry.colds], "less")
        figure("CPU a GB, first epoch", "CPU-s/GB", [each.cpu_s / gb for each in entry.colds], "less", steady=True)
        figure("CPU a GB, later epoch", "CPU-s/GB", [each.cpu_s / gb for each in entry.warms], "less", steady=True)
        peaks = [float(max(each.peak_memory_bytes for each in some)) for some in both]
        figure("memory at the peak", "B", peaks, "less", steady=True)
        if entry.source:
            figure("converting", "s", [entry.converted_s], "less")
            figure("converted data", "B", [float(entry.converted_bytes)], "less", steady=True)
        missing, repeated = sum(each.missing for each in entry.seens), sum(each.repeated for each in entry.seens)
        figure("samples that did not come", "", [float(missing)], "less", steady=True)
        figure("samples that came too often", "", [float(repeated)], "less", steady=True)
        distances = [each.distance for each in entry.seens if each.distance is not None]
        shares = [each.of_one_shard for each in entry.seens if each.of_one_shard is not None]
        if distances:
            figure("distance of neighbours, of the data", "", distances)
            figure("largest part of a batch from one shard", "", shares)
            phase.notes.append(f"a perfect shuffle has a distance of {DISTANCE_PERFECT:.2f}")
        else:
            phase.notes.append("keys of the data are not unique, so the shuffle is not judged")
        phase.notes.append(
            "each sample came exactly once in every epoch"
            if not missing + repeated
            else f"not exactly once: {missing:,} samples did not come, {repeated:,} came too often"
        )
        if any(each.payload_bytes is None for each in entry.colds):
            phase.notes.append("its bytes were not compared: it decodes by itself")
        if measure.median([each.seconds for each in entry.colds]) < _SHORT_S:
            phase.notes.append("too short to say much: give more data")
        return phase


def _about(name: str) -> About:
    about: About = module(name).ABOUT
    return about


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def ask(request: Request, folder: Path, timeout_s: float) -> Answer:
    """Do it in a process of its own, with all that it starts. Its error in a line where it fails, dies or hangs."""
    words = Words(request.peer, "it hangs, or is that slow", "what it printed may say why")
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as temp:  # short, since sockets are made there
        environment = {
            "FASTLOAD_IDLE_S": "0.5",
            "TMPDIR": temp,
            "DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}/litdata-cache",
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}/litdata-data",
        }
        with asked("fastload.bench.peers", request, words, environment) as process:
            (answer,) = answers([process], Answer, timeout_s)
    return answer


def beside(result: Result) -> Iterator[Beside]:
    """Each loader's median rates as a part of ours, which had its turns between theirs."""
    ours = result.phase(f"{PREFIX}{OURS}")
    for phase in result.phases:
        if ours is None or phase is ours or phase.error or not phase.name.startswith(PREFIX):
            continue
        ratios = [(phase.value(name) or 0.0) / (ours.value(name) or math.inf) for name in EPOCHS]
        yield Beside(phase.name.removeprefix(PREFIX), *ratios)
