"""A benchmark from the plan to the result: phases one after the other, each of which may fail without ending the rest.

Everything that is written lies in a folder of its own beside the cache directory, whose disk is measured so; it is
removed at the end, also of an interrupted run, and what a killed run left is removed by the next one. Nothing is
written to the store, and no cache of the user's is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from fastload.bench import demand, digests, limits, measure, own, prediction, runs
from fastload.bench.figures import Conclusions, findings, phase_of, rate_of
from fastload.bench.machine import machine, versions
from fastload.bench.peers import race
from fastload.bench.peers.job import Job
from fastload.bench.plan import Options, Plan, shards_within
from fastload.bench.schema import VERSION, Figure, Phase, Result, Work
from fastload.bench.verdict import sentences
from fastload.cache.tempfiles import is_running
from fastload.config import MIB, default_ram_bytes, format_bytes
from fastload.errors import ConfigError, FastloadError
from fastload.plan import check_shuffle
from fastload.redaction import redact
from fastload.store import StoreOptions

PHASES = ("store", "disk", "memory", "decode", "cold", "ram", "disk epoch", "shares", "demand")
_ARENA_LEAST = 256 * MIB
# What a phase may take beyond the time that is planned for it.
_SLACK_S = 60.0
_ENDS_S = 10.0


class Session:
    """See the module's text. A context manager: within it there is a folder to work in."""

    def __init__(self, options: Options, command: Sequence[str], report: Callable[[str], None]) -> None:
        """`report` gets a few words on what is being done, often."""
        self._options, self._command, self._report = options, list(command), report
        from fastload.config import default_cache_dir

        beside = (options.cache or default_cache_dir()).absolute()
        self._parent, self._prefix = beside.parent, f"{beside.name}-bench-"
        self.folder = self._parent / f"{self._prefix}{os.getpid()}"
        self._store_options = StoreOptions.from_environment(None)
        self._plan: Plan | None = None
        self._phases: list[Phase] = []
        self._outcomes: list[runs.Outcome] = []
        self._found = Conclusions()
        self._theirs: list[own.Outcome] = []
        self._theirs_failed: FastloadError | None = None
        self._load_before = os.getloadavg()[0]
        self._interrupted = False

    def __enter__(self) -> Session:
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"--cache {self._parent}: {error.strerror or error}; name a place where a folder can be made beside it"
            ) from error
        return self

    def _clean_up(self) -> None:
        """Remove what killed runs left."""
        for left in self._parent.glob(f"{self._prefix}*"):
            pid = left.name.removeprefix(self._prefix)
            if pid.isdecimal() and not is_running(int(pid)):
                shutil.rmtree(left, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        # The service of a run that was interrupted ends by itself, and may write meanwhile.
        until = time.monotonic() + _ENDS_S
        while self.folder.exists() and time.monotonic() < until:
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.05)
        while measure.find_processes("fastload.service", str(self.folder)) and time.monotonic() < until:
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    # The plan

    def plan(self) -> Plan:
        """List the data, and choose what is read of it. The errors of listing, as a job would have them."""
        from fastload.client.cache import Handle
        from fastload.formats import checked_format
        from fastload.pipeline.shard_listing import list_shards

        self._report("listing")
        options = self._options
        how = checked_format(options.format)
        with Handle(self.folder / "listing", ram_bytes=_ARENA_LEAST, disk_bytes=0, service="inprocess") as handle:
            with handle.consumer(None, "bench") as consumer:
                found = list_shards(consumer, list(options.urls), how, options.split).objects
                objects = [found[number] for number in range(len(found))]
            chunk_bytes = handle.limits.chunk_bytes
        whole_bytes = sum(each.size for each in objects)
        passes = (
            options.repeats
            + sum(1 + (1 - share) for share in options.cache_shares)
            + ("demand" not in options.skip)
            + race.passes(options.peers, options.repeats)
        )
        chosen = shards_within(objects, int(options.max_bytes / max(1.0, passes + 0.5)))
        self._plan = Plan(chosen, len(objects), whole_bytes, chunk_bytes, passes)
        return self._plan

    # Phases

    def run(self) -> Result:
        """All phases, and what they say. Interrupted, it gives what is there."""
        try:
            for name, phase in self._all_phases():
                if name not in self._options.skip:
                    self._phases.append(self._guarded(name, phase))
            if self._options.peers:
                self._beside()
        except KeyboardInterrupt:
            self._interrupted = True
        return self._result()

    def _all_phases(self) -> Iterator[tuple[str, Callable[[], Phase]]]:
        plan, options = self._plan, self._options
        assert plan is not None, "plan first"
        budget = limits.Budget(max(64 << 20, options.max_bytes - plan.store_bytes))
        yield "store", lambda: limits.store(plan.stored, self._store_options, budget, self._report)
        yield "disk", lambda: limits.disk(self.folder)
        yield "memory", limits.memory
        yield "cold", self._cold
        yield "ram", self._from_ram
        yield "disk epoch", self._from_disk
        if options.against:
            yield "yours", lambda: self._yours(0, "yours")
            yield "yours later", lambda: self._yours(1, "yours later")
            yield "equality", self._equality
        if options.ideal:
            yield "ideal", self._ideal
        yield "decode", self._decode
        for share in options.cache_shares:
            yield f"share {share:.0%}", lambda share=share: self._share(share)  # type: ignore[misc]
        if not options.skip & {"store", "disk", "ram"}:
            yield "prediction", self._prediction
        yield "demand", self._demand

    def _guarded(self, name: str, phase: Callable[[], Phase]) -> Phase:
        began = time.monotonic()
        self._report(name)
        try:
            return phase()
        except (FastloadError, OSError) as error:
            return Phase(name=name, seconds=time.monotonic() - began, error=redact(str(error)))

    def _settings(self, directory: str, ram_bytes: int, disk_bytes: int, **more: Any) -> runs.Settings:
        options, plan = self._options, self._plan
        assert plan is not None, "plan first"
        shuffle: bool | str = False if options.shuffle == "none" else options.shuffle
        dataset: dict[str, Any] = {"shuffle": shuffle, "seed": options.seed, "shuffle_window": options.shuffle_window}
        if options.format != "auto":
            dataset["format"] = options.format
        if options.columns:
            dataset["columns"] = list(options.columns)
        return runs.Settings(
            urls=[each.url for each in plan.stored],
            byte_count=plan.byte_count,
            dataset=dataset,
            decode=options.decode,
            batch_size=options.batch_size,
            workers=options.workers,
            directory=str(self.folder / directory),
            ram_bytes=options.ram_bytes or ram_bytes,
            disk_bytes=disk_bytes,
            functions=list(options.functions),
            **more,
        )

    def _run(self, settings: runs.Settings, epochs: float) -> runs.Outcome:
        """The settings on all ranks, within the time that so many epochs may take."""
        return runs.run(settings, self._timeout_s(epochs), self._options.ranks)

    def _timeout_s(self, epochs: float) -> float:
        return 10 * self._options.for_s * epochs + _SLACK_S

    @property
    def _arena_bytes(self) -> int:
        """An arena that holds the data, if this machine has the memory."""
        assert self._plan is not None, "plan first"
        if self._options.ram_bytes:
            return self._options.ram_bytes
        return max(_ARENA_LEAST, min(int(1.3 * self._plan.byte_count) + 128 * MIB, default_ram_bytes()))

    @property
    def _disk_bytes(self) -> int:
        assert self._plan is not None, "plan first"
        return int(1.1 * self._plan.byte_count) + 256 * MIB

    def _cold(self) -> Phase:
        """An epoch from the store, and one from RAM right after it, each time with an empty cache; and beside each of
        them the user's loader, so that both are measured in the same minutes.
        """
        began, theirs_s = time.monotonic(), 0.0
        outcomes: list[runs.Outcome] = []
        self._outcomes = outcomes
        failed: FastloadError | None = None
        for number in range(self._options.repeats):
            self._report(f"first epoch ({number + 1} of {self._options.repeats}), and one from RAM")
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.folder / "full")
            try:
                if failed is None:
                    settings = self._settings("full", self._arena_bytes, self._disk_bytes, epochs=2)
                    outcomes.append(self._run(settings, 2))
            except FastloadError as error:
                failed = error
            theirs_s -= time.monotonic()
            self._run_theirs()
            theirs_s += time.monotonic()
        if failed is not None:
            raise failed
        if not self._samples:
            self._outcomes = []
            raise ConfigError(
                f"{' '.join(map(self._shown, self._options.urls))}: its {len(self._plan.objects) if self._plan else 0} "
                "shards hold no sample; name shards that hold some"
            )
        for name, epoch in zip(("cold", "ram"), outcomes[-1].epochs, strict=True):
            self._found.bound_by[name] = epoch.bound_by, epoch.verdict
        return phase_of("cold", [each.epochs[0] for each in outcomes], time.monotonic() - began - theirs_s)

    def _run_theirs(self) -> None:
        """Two passes of the user's loader, unless it failed before."""
        options = self._options
        if not options.against or self._theirs_failed is not None:
            return
        self._report(f"{options.against}, two epochs")
        settings = own.Settings(
            target=options.against,
            passes=2,
            samples_max=self._samples,
            seconds_max=options.for_s,
            steps_s=[options.step_s] if options.step_s and not self._theirs else [],
        )
        try:
            self._theirs.append(own.run(settings, self._timeout_s(0.2)))
        except FastloadError as error:
            self._theirs_failed = error

    @property
    def _samples(self) -> int:
        """Of an epoch of fastload; 0 before one was measured."""
        return self._outcomes[0].epochs[0].samples if self._outcomes else 0

    def _yours(self, number: int, name: str) -> Phase:
        """The first or the later passes of the user's loader."""
        if self._theirs_failed is not None:
            raise self._theirs_failed
        phase = phase_of(name, [each.passes[number] for each in self._theirs], 0.0)
        for step in self._theirs[0].steps if number else ():
            phase.figures.append(
                Figure(
                    name=f"accelerator use, {step.step_s * 1e3:.3g} ms a batch",
                    unit="",
                    values=[step.utilisation],
                    better="more",
                )
            )
        return phase

    def _equality(self) -> Phase:
        """Whether the user's loader and fastload give the same samples. An epoch of each is read for that."""
        if self._theirs_failed is not None or not self._outcomes:
            raise FastloadError("not checked, since no epoch of both was measured")
        began = time.monotonic()
        ours = self._run(self._settings("full", _ARENA_LEAST, self._disk_bytes, epochs=0, digests=True), 2).columns
        settings = own.Settings(target=self._options.against, digests=True, samples_max=self._samples)
        theirs = own.run(settings, self._timeout_s(2)).columns
        found = digests.compared(ours, theirs)
        self._found.equality = found.sentence()
        notes = [f"{name}: the same values" for name in found.equal]
        notes += [f"{name}: not the same values" for name in found.different]
        notes += [f"equality was not checked: {reason}" for reason in found.unchecked]
        return Phase(
            name="equality",
            seconds=time.monotonic() - began,
            figures=[
                Figure(name="columns that are equal", unit="", values=[float(len(found.equal))], steady=True),
                Figure(name="columns that differ", unit="", values=[float(len(found.different))], steady=True),
            ],
            notes=notes,
        )

    def _ideal(self) -> Phase:
        """Batches from memory: the user's loader's where there is one, else fastload's."""
        began = time.monotonic()
        against = self._options.against
        if against:
            found = own.run(own.Settings(target=against, replays=True), self._timeout_s(1)).replayed
        else:
            settings = self._settings("full", _ARENA_LEAST, self._disk_bytes, epochs=0, replays=True)
            found = runs.run(settings, self._timeout_s(1)).replayed
        if found is None or not found.batches:
            raise FastloadError("there is no batch to replay; give more data, or a smaller --batch-size")
        phase = phase_of("ideal", [found], time.monotonic() - began)
        phase.notes.insert(0, f"of {against or 'fastload'}: {found.note}")
        return phase

    def _from_ram(self) -> Phase:
        """The epochs that followed."""
        if not self._outcomes:
            raise FastloadError("no first epoch was measured")
        phase = phase_of("ram", [each.epochs[1] for each in self._outcomes], 0.0)
        if self._plan is not None and self._arena_bytes < self._plan.byte_count:
            phase.notes.append(
                f"the arena ({format_bytes(self._arena_bytes)}) holds only a part of the data: the rest came from disk"
            )
        return phase

    def _from_disk(self) -> Phase:
        """An epoch from the disk tier that the first one filled, with a small arena. It bypasses the page cache."""
        began = time.monotonic()
        repeats = self._options.repeats
        assert self._plan is not None, "plan first"
        if self._plan.byte_count > _ARENA_LEAST:
            together = self._settings(
                "full", _ARENA_LEAST, self._disk_bytes, epochs=repeats, first_epoch=2, first_is_single=False
            )
            epochs = self._run(together, repeats).epochs
        else:  # the arena would hold it after one epoch
            alone = self._settings("full", _ARENA_LEAST, self._disk_bytes, epochs=1, first_epoch=2)
            epochs = [self._run(alone, 1).epochs[0] for _ in range(repeats)]
        self._found.bound_by["disk epoch"] = epochs[-1].bound_by, epochs[-1].verdict
        return phase_of("disk epoch", epochs, time.monotonic() - began)

    def _decode(self) -> Phase:
        options = self._options
        if not options.decode:
            return Phase(
                name="decode", seconds=0.0, notes=["nothing is decoded: --decode COLUMN=DECODER names what is"]
            )
        began = time.monotonic()
        whole = Phase(name="decode", seconds=0.0)
        for column, decoder in runs.decoders(options.decode).items():
            settings = self._settings("full", _ARENA_LEAST, self._disk_bytes, epochs=0, sample_column=column)
            values = runs.run(settings, self._timeout_s(1)).values
            if not values:
                raise ConfigError(f"--decode {column}: none of the first samples has a value of it")
            found = limits.decode(decoder, column, values, max(1, options.workers))
            whole.figures += found.figures
            whole.series += found.series
        whole.seconds = time.monotonic() - began
        return whole

    def _share(self, share: float) -> Phase:
        """Later epochs with a disk cache of a part of the data: the second, after one that filled it."""
        assert self._plan is not None, "plan first"
        began = time.monotonic()
        quota = prediction.disk_bytes(share, self._plan.byte_count)
        if quota < 1.01 * self._plan.chunk_bytes:
            raise ConfigError(
                f"--cache-share {share:.0%} is {format_bytes(quota)} of what is read, below one chunk of "
                f"{format_bytes(self._plan.chunk_bytes)}; give a larger share, or more data with --max-bytes"
            )
        settings = self._settings("share", _ARENA_LEAST, quota, epochs=2)
        try:
            epoch = self._run(settings, 2).epochs[1]
        finally:
            shutil.rmtree(self.folder / "share", ignore_errors=True)
        self._found.shares.append((share, rate_of(epoch)))
        return phase_of(f"share {share:.0%}", [epoch], time.monotonic() - began)

    def _prediction(self) -> Phase:
        """Later epochs with disk caches of several sizes in virtual time, beside those that were run."""
        began = time.monotonic()
        plan, options = self._plan, self._options
        assert plan is not None, "plan first"
        found = {
            (phase, name): self._figure(phase, name)
            for phase, name in (
                ("store", "first byte, p50"),
                ("store", "rate of a connection"),
                ("store", "goodput"),
                ("disk", "read"),
                ("disk", "write"),
                ("ram", "samples"),
            )
        }
        lacking = sorted({phase for (phase, _), value in found.items() if not value})
        if lacking or not self._samples:
            return Phase(name="prediction", seconds=0.0, notes=[f"nothing is predicted without {', '.join(lacking)}"])
        window = options.shuffle_window
        measured = prediction.Measured(
            plan.byte_count,
            self._samples,
            len(plan.objects),
            plan.chunk_bytes,
            options.ram_bytes or _ARENA_LEAST,
            options.batch_size,
            options.workers,
            options.ranks,
            check_shuffle(options.shuffle),
            window if isinstance(window, int) else None,
            *(value or 0.0 for value in found.values()),
        )
        ran = {share: rate.samples_per_s for share, rate in self._found.shares}
        predicted = prediction.predict(measured, options.cache_shares)
        if measured.is_telling:
            self._found.predicted = predicted
        phase = prediction.phase_of(measured, predicted, self._figure("cold", "samples"), ran)
        phase.seconds = time.monotonic() - began
        return phase

    def _demand(self) -> Phase:
        """How often a consumer may ask for a batch: of data from the store, and of cached data."""
        began = time.monotonic()
        phase = Phase(name="demand", seconds=0.0)
        self._demand_of(
            phase, "Cached", "full", self._disk_bytes, self._arena_bytes, self._figure("disk epoch", "samples")
        )
        self._demand_of(phase, "From the store", "none", 0, _ARENA_LEAST, self._figure("cold", "samples"))
        phase.seconds = time.monotonic() - began
        if not phase.figures:
            phase.error = "neither a first epoch nor one from the cache was measured"
        return phase

    def _figure(self, phase: str, name: str) -> float | None:
        """The median of a figure of a phase that is over; None where it failed or was left out."""
        found = next((each for each in self._phases if each.name == phase and not each.error), None)
        return None if found is None else found.value(name)

    def _demand_of(
        self, phase: Phase, state: str, directory: str, disk_bytes: int, ram_bytes: int, per_s: float | None
    ) -> None:
        if not per_s:
            return
        options = self._options
        self._report(f"demand, {state.lower()}")

        def use_at(step_s: float) -> float:
            window_s = min(8.0, max(2.0, 12 * step_s, options.for_s / 8))
            settings = self._settings(
                directory, ram_bytes, disk_bytes, epochs=0, first_epoch=8, steps_s=[step_s], step_for_s=window_s
            )
            (step,) = self._run(settings, 1 + 0.4 * window_s / options.for_s).steps
            return step.utilisation

        if is_given := bool(options.step_s):
            tried = [(options.step_s, use_at(options.step_s))]
        else:
            tried = demand.search(use_at, options.ranks * options.batch_size / per_s, options.busy)
        found = demand.found(state, tried, options.busy, is_given=is_given)
        self._found.demands.append(found)
        demand.add(phase, found, tried, is_given=is_given)

    def _beside(self) -> None:
        """Other loaders and ours, in turns; a phase for each."""
        options, plan, began = self._options, self._plan, time.monotonic()
        assert plan is not None, "plan first"
        folder = self.folder / "peers"
        folder.mkdir()
        job = Job(
            urls=[each.url for each in plan.stored],
            columns=list(options.columns),
            decode=options.decode,
            batch_size=options.batch_size,
            workers=options.workers,
            folder=str(folder),
            ram_bytes=self._arena_bytes,
            cache_bytes=self._disk_bytes,
            shuffle=options.shuffle,
            seed=options.seed,
        )
        turns = race.Race(
            options.peers,
            plan.objects,
            job,
            folder,
            store_options=self._store_options,
            repeats=options.repeats,
            arena_least=_ARENA_LEAST,
            timeout_s=self._timeout_s(3),
            report=self._report,
        )
        try:
            turns.run()
        except (FastloadError, OSError) as error:
            self._phases.append(Phase(name="peers", seconds=time.monotonic() - began, error=redact(str(error))))
        finally:
            self._phases += turns.phases()
            shutil.rmtree(folder, ignore_errors=True)

    # The result

    def _result(self) -> Result:
        plan, options = self._plan, self._options
        assert plan is not None, "plan first"
        result = Result(
            version=VERSION,
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=[self._shown(word) for word in self._command],
            versions=versions(),
            machine=machine(self._parent, self._load_before),
            work=self._work(plan),
            phases=self._phases,
            interrupted=self._interrupted,
        )
        self._found.peers = list(race.beside(result))
        result.verdict = sentences(findings(result, plan, options, self._found, self._load_before))
        return result

    def _shown(self, text: str) -> str:
        """Without credentials, and without the host where that is not to be shown."""
        shown = redact(text)
        return shown if self._options.show_endpoints else re.sub(r"(https?://)[^/]+", r"\1***", shown)

    def _work(self, plan: Plan) -> Work:
        options = self._options
        facts = {
            "shuffle": options.shuffle,
            "seed": str(options.seed),
            "columns": " ".join(options.columns),
            "decode": " ".join(f"{column}={spec}" for column, spec in sorted(options.decode.items())),
            "batch_size": str(options.batch_size),
            "workers": str(options.workers),
            "cache_shares": " ".join(map(str, options.cache_shares)),
        }
        further = {
            "ranks": str(options.ranks) if options.ranks > 1 else "",
            "map": " ".join(options.functions),
            "ram_bytes": str(options.ram_bytes or ""),
            "shuffle_window": "" if options.shuffle_window == "auto" else str(options.shuffle_window),
            "against": options.against,
            "profile": options.profile,
        }
        facts |= {name: value for name, value in further.items() if value}
        lines = [f"{each.url.rpartition('/')[2]} {each.size} {each.etag}" for each in plan.objects]
        lines += [f"{name}={value}" for name, value in facts.items()]
        samples = next((int(each.value("samples of an epoch") or 0) for each in self._phases if each.name == "cold"), 0)
        return Work(
            urls=[self._shown(url) for url in options.urls],
            shards=len(plan.objects),
            samples=samples,
            byte_count=plan.byte_count,
            options=facts,
            digest=hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        )
