"""`fastload warm`: fill a cache for exactly one job, in its order of first use; or say what of that is there.

Whatever the options name becomes a list of `_Task`s: a job's data, several for a mixture, or what an earlier run read.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from fastload.cli import exits
from fastload.cli.cache_options import CacheOptions, CachePath, ChunkBytes, DiskBytes, RamBytes, cache_directory, shown
from fastload.cli.printing import JsonOption, plain, print_json
from fastload.config import format_bytes, parse_rate, parse_seconds
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.client.cache import Cache
    from fastload.daemon.config import DataTable
    from fastload.prepare import Outlook, PinTerms, Warmed, WarmJob
    from fastload.protocol import Progress, WarmTerms

_ORDERS = ("window", "shards", "global", "none")
_LIST_BYTES_MAX = 256 << 20


class WarmCommand(TyperCommand):
    """`--shuffle` was a flag once: alone it is `--shuffle=window`, and `--no-shuffle` is `--shuffle=none`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class's text."""
        spelled = list(args)
        for at, word in enumerate(args):
            if word == "--":
                break
            if word == "--no-shuffle":
                spelled[at] = "--shuffle=none"
            elif word == "--shuffle" and (at + 1 == len(args) or args[at + 1] not in _ORDERS):
                spelled[at] = "--shuffle=window"
        return super().parse_args(ctx, spelled)


@dataclass(slots=True)
class _Task:
    """One thing to warm: a job's data, or what an earlier run read (`run_urls`); and the last progress that came."""

    name: str
    job: WarmJob | None
    run_urls: list[str] = field(default_factory=list)
    storage_options: dict[str, Any] = field(default_factory=dict)
    terms: WarmTerms | None = None
    pin: PinTerms | None = None
    progress: Progress | None = None


def warm(
    context: typer.Context,
    urls: Annotated[
        list[str] | None, typer.Argument(help="Brace patterns, prefixes that end in '/', or single shards.")
    ] = None,
    list_file: Annotated[
        str | None, typer.Option("--list", help="A file with a URL a line, and '#' for comments; - is standard input.")
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(help="Instead: a TOML file with a [[data]] table as the daemon's; several: a mixture."),
    ] = None,
    from_history: Annotated[
        str | None, typer.Option(help="Instead: what this run read, in its order; `latest`, or see `fastload history`.")
    ] = None,
    cache: CachePath = None,
    shuffle: Annotated[str, typer.Option(help="How the job shuffles: window, shards, global or none.")] = "window",
    seed: Annotated[int, typer.Option(help="The job's seed.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="The epoch that the job begins with.")] = 0,
    node: Annotated[int, typer.Option(min=0, help="This node's number in the job, from 0.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="The job's number of nodes.")] = 1,
    partitions: Annotated[int | None, typer.Option(help="The job's partitions, if it names them.")] = None,
    index: Annotated[str | None, typer.Option(help="The job's file of indexes, if it names one.")] = None,
    manifest: Annotated[str | None, typer.Option(help="The job's file with the list of shards, if it has one.")] = None,
    shuffle_window: Annotated[str, typer.Option(help="The job's shuffle window, such as 1GiB.")] = "auto",
    profile: Annotated[str | None, typer.Option(help="The profile of the store's credentials, as in ~/.aws.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Fetch no more than that, such as 200MB/s.")] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Before other warm-ups, to be done by then: 2h, or 2027-01-31T08:00.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it: no other data displaces what was warmed.")] = False,
    ttl: Annotated[str | None, typer.Option(help="Unpin it when it was not used for so long, such as 14d.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fetch nothing, and say what is held. Exit code 0: all of it; 3: less.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read back what is on disk of it, and fetch again what is damaged.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fetch nothing, and say what would be.")] = False,
    daemon: Annotated[bool, typer.Option("--daemon", help="Hand it over to the daemon, and print its id.")] = False,
    as_json: JsonOption = False,
    ram_bytes: RamBytes = None,
    disk_bytes: DiskBytes = None,
    chunk_bytes: ChunkBytes = None,
) -> None:
    """Fill the cache for a job, so that it fetches nothing: same URLs, seed and shuffle as the job.

    Or with --from-history, for one that reads what an earlier run read, whatever its order. It stands back behind jobs
    that fetch from stores.
    """
    named = [*(urls or []), *(read_list(list_file) if list_file else [])]
    if sum([bool(named), job is not None, from_history is not None]) != 1:
        raise ConfigError("name either URLs (or --list), or --job=FILE, or --from-history=RUN, and not more than one")
    if sum([check, dry_run, daemon]) > 1:
        raise ConfigError("--check, --dry-run and --daemon exclude each other; give one of them")
    if verify and (dry_run or daemon or from_history is not None):
        raise ConfigError(
            "--verify goes with URLs, --list or --job, and with --check; for others see fastload cache verify"
        )
    if ttl is not None and not pin and job is None:
        raise ConfigError(f"--ttl={ttl} is that of a pin; add --pin, or leave it out")
    order = {
        "seed": seed,
        "shuffle": _checked_shuffle(shuffle),
        "shuffle_window": shuffle_window,
        "epoch": epoch,
        "node": node,
        "nodes": nodes,
        "partitions": partitions,
        "index": index,
        "manifest": manifest,
    }
    given = {name: value for name, value in order.items() if _is_given(context, name)}
    if from_history is not None and (given or pin):
        what = "--pin" if pin else f"--{next(iter(given)).replace('_', '-')}"
        raise ConfigError(f"{what} goes with URLs, --list or --job; what a run read has its own order, and no pin")
    asked = _Asked(profile, bandwidth, deadline, pin, ttl)
    if daemon:
        _hand_over(cache_directory(cache), named, job, order if named else given, asked, as_json=as_json)
        return
    if job is not None:
        tasks = [_task_of_table(table, asked) for table in _tables(job, given)]
        if ttl is not None and not any(task.pin for task in tasks):
            raise ConfigError(f"--ttl={ttl} is that of a pin, which {job} has none of; add --pin, or leave it out")
    elif from_history is not None:
        run, run_urls = _read_run(cache_directory(cache), from_history)
        tasks = [_Task(run, None, run_urls, asked.storage_options, asked.terms())]
    else:
        tasks = [_task_of_urls(named, order, asked)]
    options, console = CacheOptions(cache, ram_bytes, disk_bytes, chunk_bytes), Console(stderr=True)
    with options.open() as opened:
        if check or dry_run:
            _show_outlook(opened, tasks, is_check=check, verifies=verify, as_json=as_json)
        else:
            _warm_all(opened, tasks, console, verifies=verify, as_json=as_json)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was written, and has not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# What to warm


@dataclass(frozen=True, slots=True)
class _Asked:
    """Options that hold for all that is warmed, as they were written."""

    profile: str | None
    bandwidth: str | None
    deadline: str | None
    pin: bool
    ttl: str | None

    @property
    def storage_options(self) -> dict[str, Any]:
        return {} if self.profile is None else {"profile": self.profile}

    def terms(self, table: DataTable | None = None) -> WarmTerms:
        """How fast and how soon; what no option says is the table's."""
        from fastload.protocol import WarmTerms

        bytes_per_s = table.bytes_per_s if table is not None else 0
        if self.bandwidth is not None:
            bytes_per_s = parse_rate(self.bandwidth, "--bandwidth")
            if not bytes_per_s:
                raise ConfigError(f"--bandwidth={self.bandwidth} lets nothing through; leave it out for no limit")
        deadline = deadline_of(self.deadline, time.time()) if self.deadline is not None else 0.0
        if not deadline and table is not None and table.deadline_s is not None:
            deadline = time.time() + table.deadline_s
        return WarmTerms(bytes_per_s, table.priority if table is not None else 0, deadline)

    @property
    def ttl_s(self) -> float:
        seconds = 0.0 if self.ttl is None else parse_seconds(self.ttl, "--ttl")
        if self.ttl is not None and not seconds:
            raise ConfigError(f"--ttl={self.ttl} would end the pin at once; leave it out for no end")
        return seconds


def deadline_of(text: str, now: float) -> float:
    """`2h`, which counts from now, or a time such as `2027-01-31T08:00`, here where nothing else is said: as seconds
    since 1970.
    """
    try:
        at = datetime.fromisoformat(text).timestamp() if "-" in text[1:] else now + parse_seconds(text, "--deadline")
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--deadline={text} is no time; write 2h, or 2027-01-31T08:00") from None
    if at <= now:
        raise ConfigError(f"--deadline={text} has passed; give a time to come, or a length of time such as 2h")
    return at


def read_list(name: str) -> list[str]:
    """The URLs of a file, one a line; blank lines and those that begin with `#` are none. `-` is standard input."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LIST_BYTES_MAX + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(_LIST_BYTES_MAX + 1)
        lines = [line.strip() for line in data.decode().splitlines()]
    except OSError as error:
        raise ConfigError(f"--list={name}: it cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--list={name}: it is no text in UTF-8; write one URL a line") from None
    if len(data) > _LIST_BYTES_MAX:
        raise ConfigError(f"--list={name} is longer than {format_bytes(_LIST_BYTES_MAX)}; name prefixes instead")
    urls = [line for line in lines if line and not line.startswith("#")]
    if not urls:
        raise ConfigError(f"--list={name} names no URL; write one a line")
    return urls


def _checked_shuffle(shuffle: str) -> str:
    if shuffle not in _ORDERS:
        raise ConfigError(f"--shuffle={shuffle} must be {', '.join(_ORDERS[:-1])} or {_ORDERS[-1]}")
    return shuffle


def _task_of_urls(urls: list[str], order: Mapping[str, Any], asked: _Asked) -> _Task:
    from fastload.arguments import checked_urls
    from fastload.plan import Ranks
    from fastload.prepare import PinTerms, WarmJob
    from fastload.store.listing import expand
    from fastload.warmup import pin_name, requested_order

    for url in checked_urls(urls):
        expand(url)
    node, nodes = order["node"], order["nodes"]
    if node >= nodes:
        raise ConfigError(f"--node={node} must be from 0 to {nodes - 1}, since --nodes={nodes}")
    job = WarmJob(
        urls,
        requested_order(order["shuffle"], order["seed"], order["shuffle_window"], order["partitions"]),
        order["epoch"],
        Ranks(node, nodes, 0, 1),
        order["index"],
        order["manifest"],
    )
    pin = PinTerms(pin_name(urls), asked.ttl_s) if asked.pin else None
    return _Task("", job, [], asked.storage_options, asked.terms(), pin)


def _tables(file: Path, order: Mapping[str, Any]) -> list[DataTable]:
    """Those of the file, whose jobs read in the `order` that was given besides."""
    from msgspec.structs import replace as changed

    from fastload.daemon.config import read_tables

    tables = [changed(table, job=changed(table.job, **order)) for table in read_tables(file, os.environ)]
    for table in tables:
        table.check()
    return tables


def _task_of_table(table: DataTable, asked: _Asked) -> _Task:
    from fastload.daemon.config import storage_options_of
    from fastload.plan import Ranks, RequestedOrder
    from fastload.prepare import PinTerms, WarmJob

    order = table.job
    job = WarmJob(
        table.urls,
        RequestedOrder(order.seed, order.shuffle, order.window_bytes, order.partitions),
        order.epoch,
        Ranks(order.node, order.nodes, 0, 1),
        order.index,
        order.manifest,
    )
    pin = None
    if table.pin or asked.pin:
        pin = PinTerms(table.name, asked.ttl_s or table.ttl_s or 0.0, table.quota_bytes or 0)
    options = asked.storage_options or storage_options_of(table.credentials)
    return _Task(table.name, job, [], options, asked.terms(table), pin)


# Handing over


def _hand_over(
    directory: Path, urls: list[str], file: Path | None, order: Mapping[str, Any], asked: _Asked, *, as_json: bool
) -> None:
    """Submit it to the daemon, and print the id of each job."""
    import msgspec

    from fastload.daemon.submission import submit

    tables = [msgspec.to_builtins(table) for table in _tables(file, order)] if file is not None else []
    if urls:
        from fastload.store import normalise
        from fastload.warmup import pin_name

        job = {name: value for name, value in order.items() if value is not None}
        tables = [{"name": pin_name(urls), "urls": [normalise(url) for url in urls], "job": job, "when": "once"}]
    if not tables:
        raise ConfigError("--daemon takes URLs, --list or --job; what a run read is warmed by this command itself")
    given = {
        "credentials": None if asked.profile is None else f"profile:{asked.profile}",
        "bandwidth": asked.bandwidth,
        "deadline": None if asked.deadline is None else deadline_of(asked.deadline, time.time()) - time.time(),
        "pin": asked.pin or None,
        "ttl": asked.ttl,
    }
    given = {name: value for name, value in given.items() if value is not None}
    ids = [submit(directory, _without_variables({**table, **given})) for table in tables]
    if as_json:
        print_json({"ids": ids})
    else:
        print("\n".join(ids))


def _without_variables(value: Any) -> Any:
    """What was written as it is to be: a dollar sign begins no variable."""
    match value:
        case dict():
            return {name: _without_variables(each) for name, each in value.items()}
        case list():
            return [_without_variables(each) for each in value]
        case str():
            return value.replace("$", "$$")
        case _:
            return value


# Looking


def _show_outlook(cache: Cache, tasks: Sequence[_Task], *, is_check: bool, verifies: bool, as_json: bool) -> None:
    """Print what is held, or what fetching the rest would take; exit code 3 where a check finds less than all, and 4
    where some of it is damaged.
    """
    from fastload import prepare

    found: list[tuple[_Task, Outlook]] = []
    damaged_chunks = 0
    for task in tasks:
        if task.job is None:
            outlook = prepare.look_at_run(task.run_urls, cache, storage_options=task.storage_options)
        else:
            outlook = prepare.look(task.job, cache, storage_options=task.storage_options)
            damaged_chunks += _verify(cache, task, repair=False) if verifies else 0
        found.append((task, outlook))
    is_complete = all(outlook.is_complete for _, outlook in found)
    if as_json:
        values = [_outlook_values(*each) for each in found]
        print_json({"data": values, "is_complete": is_complete, "damaged_chunks": damaged_chunks})
    else:
        for task, outlook in found:
            print(plain(_named(task, _check_text(outlook) if is_check else _dry_run_text(task, outlook))))
        if verifies:
            print(_verified_text(damaged_chunks))
    if damaged_chunks:
        raise typer.Exit(exits.DAMAGED)
    if is_check and not is_complete:
        raise typer.Exit(exits.PARTIAL)


def _outlook_values(task: _Task, outlook: Outlook) -> dict[str, Any]:
    return {
        "name": task.name or None,
        "shards": outlook.object_count,
        "total_bytes": outlook.total_bytes,
        "held_bytes": outlook.held_bytes,
        "ram_bytes": outlook.ram_bytes,
        "disk_bytes": outlook.disk_bytes,
        "to_fetch_bytes": outlook.total_bytes - outlook.held_bytes,
        "requests": outlook.request_count,
        "seconds": _seconds(task, outlook),
    }


def _check_text(outlook: Outlook) -> str:
    return (
        f"{outlook.object_count} shards: {format_bytes(outlook.held_bytes)} of {format_bytes(outlook.total_bytes)} "
        f"held ({format_bytes(outlook.disk_bytes)} on disk, {format_bytes(outlook.ram_bytes)} in RAM)"
    )


def _dry_run_text(task: _Task, outlook: Outlook) -> str:
    seconds, missing_bytes = _seconds(task, outlook), outlook.total_bytes - outlook.held_bytes
    text = (
        f"{outlook.object_count} shards, {format_bytes(outlook.total_bytes)}: {format_bytes(outlook.held_bytes)} held, "
        f"{format_bytes(missing_bytes)} to fetch in {outlook.request_count} requests"
    )
    if seconds is None:
        return f"{text}; how long that takes is not known, as nothing was measured yet"
    rate = format_bytes(missing_bytes / seconds) if seconds else "0 B"
    return f"{text}; about {_duration(seconds)}, at {rate}/s" if missing_bytes else text


def _seconds(task: _Task, outlook: Outlook) -> float | None:
    """How long fetching the rest takes at the rate that was measured, or that is given; None: neither is known."""
    assert task.terms is not None, "a task without terms"
    rates = [rate for rate in (task.terms.bytes_per_s, outlook.bytes_per_s) if rate]
    missing_bytes = outlook.total_bytes - outlook.held_bytes
    return missing_bytes / min(rates) if rates else None if missing_bytes else 0.0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _named(task: _Task, text: str) -> str:
    return f"{task.name}: {text}" if task.name else text


def _read_run(directory: Path, named: str) -> tuple[str, list[str]]:
    """The name of the run that is called so, and the URLs of what it read."""
    from fastload.history.archive import Archive

    archive = Archive(directory)
    run = archive.read(archive.find(named))
    return run.name, [url for rows in run.objects.rows() for url, *_ in rows]


# Warming


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _warm_all(cache: Cache, tasks: Sequence[_Task], console: Console, *, verifies: bool, as_json: bool) -> None:
    """Warm one after the other; exit code 3 where the cache holds less than all in the end, and where a signal ends it
    that of the signal.
    """
    found: list[tuple[_Task, Warmed]] = []
    began, stopped, damaged_chunks = time.monotonic(), 0, 0
    try:
        with _terminable(), shown(console, "warming") as bar:
            for task in tasks:
                before = sum(warmed.total_bytes for _, warmed in found)
                warmed = _warm(cache, task, before, bar.show)
                damaged = _verify(cache, task, repair=True) if verifies else 0
                if damaged:
                    damaged_chunks += damaged
                    again = _warm(cache, task, before, bar.show)
                    warmed = replace(again, fetched_bytes=warmed.fetched_bytes + again.fetched_bytes)
                found.append((task, warmed))
    except KeyboardInterrupt as error:
        stopped = exits.TERMINATED if isinstance(error, _Terminated) else exits.INTERRUPTED
    is_complete = not stopped and all(warmed.is_complete for _, warmed in found)
    if as_json:
        values = [_values(task, warmed) for task, warmed in found]
        values += [_progress_values(task) for task in tasks[len(found) :] if stopped and task.progress]
        seconds = time.monotonic() - began
        print_json(
            {
                "data": values,
                "is_complete": is_complete,
                "was_stopped": stopped > 0,
                "damaged_chunks": damaged_chunks,
                "seconds": seconds,
            }
        )
    else:
        for task, warmed in found:
            _say(console, _named(task, _result_text(task, warmed)))
        if verifies and not stopped:
            _say(console, _verified_text(damaged_chunks, "fetched again"))
    if stopped:
        _say(console, _stopped_text(tasks[len(found) :]))
        raise typer.Exit(stopped)
    for task, _ in found:
        assert task.terms is not None, "a task without terms"
        late_s = time.time() - task.terms.deadline if task.terms.deadline else 0.0
        if late_s > 0:
            _say(console, _named(task, f"The deadline has passed {_duration(late_s)} ago."))
    if not is_complete:
        _say(console, "The cache is full: raise disk_bytes, or expect the job to fetch the rest itself.")
        raise typer.Exit(exits.PARTIAL)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: with what was begun being cleaned up."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warm(cache: Cache, task: _Task, before: int, show: Callable[[int, int], None]) -> Warmed:
    """Warm one; `before`: bytes of those before it."""
    from fastload import prepare

    def on_progress(progress: Progress) -> None:
        task.progress = progress
        show(before + progress.done_bytes, before + progress.total_bytes)

    assert task.terms is not None, "a task without terms"
    options = {"storage_options": task.storage_options, "terms": task.terms, "on_progress": on_progress}
    if task.job is not None:
        return prepare.warm(task.job, cache, pin=task.pin, label=task.name, **options)  # type: ignore[arg-type]
    return prepare.warm_run(task.run_urls, cache, **options)  # type: ignore[arg-type]


def _verify(cache: Cache, task: _Task, *, repair: bool) -> int:
    """Read back what is on disk of a job's data: how many chunks are damaged, which go where that is to be repaired."""
    from fastload.client.cache import named
    from fastload.client.operator import Operator
    from fastload.store import normalise

    assert task.job is not None, "what a run read is not verified"
    damaged_chunks = 0
    with cache._handle.consumer(name="verify"), Operator.connect(cache.directory, "verify") as operator:
        for verified in operator.verify(named([normalise(url) for url in task.job.urls]), repair=repair):
            damaged_chunks = verified.damaged_chunks
    return damaged_chunks


def _verified_text(damaged_chunks: int, what: str = "which jobs would fetch again") -> str:
    if not damaged_chunks:
        return "What is on disk was read back, and is sound."
    return f"What is on disk was read back: {damaged_chunks} chunks were damaged, {what}."


def _result_text(task: _Task, warmed: Warmed) -> str:
    if task.job is None:
        gone = f", {warmed.missing_count} are gone" if warmed.missing_count else ""
        what = f"{warmed.object_count} objects{gone}"
    else:
        what = f"{warmed.object_count} shards, {warmed.sample_count} samples"
    return (
        f"{what}: {format_bytes(warmed.held_bytes)} of {format_bytes(warmed.total_bytes)} cached, "
        f"{format_bytes(warmed.fetched_bytes)} fetched"
    )


def _values(task: _Task, warmed: Warmed) -> dict[str, Any]:
    return {
        "name": task.name or None,
        "shards": warmed.object_count,
        "samples": warmed.sample_count,
        "missing": warmed.missing_count,
        "total_bytes": warmed.total_bytes,
        "held_bytes": warmed.held_bytes,
        "fetched_bytes": warmed.fetched_bytes,
    }


def _progress_values(task: _Task) -> dict[str, Any]:
    """Of one that was stopped."""
    progress = task.progress
    assert progress is not None, "it has not begun"
    return {
        "name": task.name or None,
        "total_bytes": progress.total_bytes,
        "held_bytes": progress.held_bytes,
        "fetched_bytes": progress.fetched_bytes,
    }


def _stopped_text(left: Sequence[_Task]) -> str:
    """What is held of the one that was stopped."""
    if not left or left[0].progress is None:
        return "Stopped before anything was fetched of what was to come."
    progress = left[0].progress
    held = f"{format_bytes(progress.held_bytes)} of {format_bytes(progress.total_bytes)}"
    return _named(left[0], f"Stopped: {held} are held, and stay; the same command goes on from there.")


def _say(console: Console, text: str) -> None:
    console.print(plain(text), soft_wrap=True, markup=False, highlight=False)
