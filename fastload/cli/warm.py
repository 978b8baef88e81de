"""`fastload warm`: fill a cache for exactly one job, in its order of first use; or say what of that is there.

What the options name becomes a list of `Task`s (`warm_tasks`). Here they are warmed, or looked at, and it is said what
came of that.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from fastload.cli import exits
from fastload.cli.cache import damaged_in
from fastload.cli.cache_options import (
    CacheOptions,
    CachePath,
    ChunkBytes,
    DiskBytes,
    FormatOption,
    RamBytes,
    SplitOption,
    cache_directory,
    shown,
)
from fastload.cli.printing import JsonOption, plain, print_json
from fastload.cli.warm_tasks import (
    ORDERS,
    Asked,
    Task,
    checked_shuffle,
    hand_over,
    read_list,
    tables_of,
    task_of_run,
    task_of_table,
    task_of_urls,
)
from fastload.config import CacheLimits, format_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.client.cache import Cache
    from fastload.prepare import Outlook, Warmed
    from fastload.protocol import Progress

_FAILED_SHOWN = 20


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
            elif word == "--shuffle" and (at + 1 == len(args) or args[at + 1] not in ORDERS):
                spelled[at] = "--shuffle=window"
        return super().parse_args(ctx, spelled)


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
    format_name: FormatOption = "auto",
    split: SplitOption = None,
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
        "shuffle": checked_shuffle(shuffle),
        "shuffle_window": shuffle_window,
        "epoch": epoch,
        "node": node,
        "nodes": nodes,
        "partitions": partitions,
        "index": index,
        "manifest": manifest,
        "format": format_name,
        "split": split,
    }
    given = {name: value for name, value in order.items() if _is_given(context, _PARAMETERS.get(name, name))}
    if from_history is not None and (given.keys() - {"format"} or pin):
        what = "--pin" if pin else f"--{min(given.keys() - {'format'}).replace('_', '-')}"
        raise ConfigError(f"{what} goes with URLs, --list or --job; what a run read has its own order, and no pin")
    asked = Asked(profile, bandwidth, deadline, pin, ttl)
    if daemon:
        ids = hand_over(cache_directory(cache), named, job, order if named else given, asked)
        if as_json:
            print_json({"ids": ids})
        else:
            print("\n".join(ids))
        return
    if job is not None:
        tasks = [task_of_table(table, asked) for table in tables_of(job, given)]
        if ttl is not None and not any(task.pin for task in tasks):
            raise ConfigError(f"--ttl={ttl} is that of a pin, which {job} has none of; add --pin, or leave it out")
    elif from_history is not None:
        tasks = [task_of_run(cache_directory(cache), from_history, format_name, asked)]
    else:
        tasks = [task_of_urls(named, order, asked)]
    options, console = CacheOptions(cache, ram_bytes, disk_bytes, chunk_bytes), Console(stderr=True)
    if check or dry_run:
        _show_outlook(cache, options.limits(), tasks, is_check=check, verifies=verify, as_json=as_json)
        return
    with options.open() as opened:
        _warm_all(opened, tasks, console, verifies=verify, as_json=as_json)


# Where a parameter is not called as its option.
_PARAMETERS = {"format": "format_name"}


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was written, and has not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# Looking


def _show_outlook(
    cache: Path | None,
    limits: CacheLimits,
    tasks: Sequence[Task],
    *,
    is_check: bool,
    verifies: bool,
    as_json: bool,
) -> None:
    """Print what is held, or what fetching the rest would take, and change nothing; exit code 3 where a check finds
    less than all, and 4 where some of it is damaged.
    """
    from fastload import prepare

    directory = cache_directory(cache)
    found: list[tuple[Task, Outlook]] = []
    damaged_chunks = 0
    for task in tasks:
        what = task.job or task.run
        assert what is not None, "a task of nothing"
        outlook = prepare.look(what, directory, storage_options=task.storage_options, limits=limits)
        damaged_chunks += damaged_in(directory, _names_of(task)) if verifies else 0
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


def _outlook_values(task: Task, outlook: Outlook) -> dict[str, Any]:
    return {
        "name": task.name or None,
        "shards": outlook.object_count,
        "total_bytes": outlook.total_bytes,
        "held_bytes": outlook.held_bytes,
        "ram_bytes": outlook.ram_bytes,
        "disk_bytes": outlook.disk_bytes,
        "stored_bytes": outlook.stored_bytes,
        "to_fetch_bytes": outlook.to_fetch_bytes,
        "requests": outlook.request_count,
        "seconds": _seconds(task, outlook),
    }


def _check_text(outlook: Outlook) -> str:
    return (
        f"{outlook.object_count} shards: {format_bytes(outlook.held_bytes)} of {format_bytes(outlook.total_bytes)} "
        f"held ({format_bytes(outlook.disk_bytes)} on disk, {format_bytes(outlook.ram_bytes)} in RAM)"
    )


def _dry_run_text(task: Task, outlook: Outlook) -> str:
    seconds, fetch_bytes = _seconds(task, outlook), outlook.to_fetch_bytes
    packed = _packed_text(outlook.stored_bytes, outlook.stored_bytes != outlook.total_bytes)
    text = (
        f"{outlook.object_count} shards, {format_bytes(outlook.total_bytes)}{packed}: "
        f"{format_bytes(outlook.held_bytes)} held, {format_bytes(fetch_bytes)} to fetch in {outlook.request_count} "
        "requests"
    )
    if seconds is None:
        return f"{text}; how long that takes is not known, as nothing was measured yet"
    rate = format_bytes(fetch_bytes / seconds) if seconds else "0 B"
    return f"{text}; about {_duration(seconds)}, at {rate}/s" if fetch_bytes else text


def _packed_text(packed_bytes: int, are_packed: bool) -> str:
    """What is said behind a number of unpacked bytes."""
    return f" ({format_bytes(packed_bytes)} packed)" if are_packed else ""


def _seconds(task: Task, outlook: Outlook) -> float | None:
    """How long fetching the rest takes at the rate that was measured, or that is given; None: neither is known."""
    assert task.terms is not None, "a task without terms"
    rates = [rate for rate in (task.terms.bytes_per_s, outlook.bytes_per_s) if rate]
    return outlook.to_fetch_bytes / min(rates) if rates else None if outlook.to_fetch_bytes else 0.0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _named(task: Task, text: str) -> str:
    return f"{task.name}: {text}" if task.name else text


# Warming


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _warm_all(cache: Cache, tasks: Sequence[Task], console: Console, *, verifies: bool, as_json: bool) -> None:
    """Warm one after the other; exit code 3 where the cache holds less than all in the end, and where a signal ends it
    that of the signal.
    """
    found: list[tuple[Task, Warmed]] = []
    began, stopped, damaged_chunks = time.monotonic(), 0, 0
    try:
        with _terminable(), shown(console, "warming") as bar:
            for task in tasks:
                before = sum(warmed.total_bytes for _, warmed in found)
                warmed = _warm(cache, task, before, bar.show)
                damaged = _verify(cache, task) if verifies else 0
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
    for task, warmed in found:
        for url, why in islice(warmed.failed.items(), _FAILED_SHOWN):
            _say(console, _named(task, f"failed: {url}: {type(why).__name__}: {why}"))
        if len(warmed.failed) > _FAILED_SHOWN:
            _say(console, _named(task, f"failed: and {len(warmed.failed) - _FAILED_SHOWN} more"))
    if any(warmed.held_bytes < warmed.total_bytes and not warmed.failed for _, warmed in found):
        _say(console, "The cache is full: raise disk_bytes, or expect the job to fetch the rest itself.")
    if not is_complete:
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


def _warm(cache: Cache, task: Task, before: int, show: Callable[[int, int], None]) -> Warmed:
    """Warm one; `before`: bytes of those before it."""
    from fastload import prepare

    def on_progress(progress: Progress) -> None:
        task.progress = progress
        show(before + progress.done_bytes, before + progress.total_bytes)

    assert task.terms is not None, "a task without terms"
    options = {"storage_options": task.storage_options, "terms": task.terms, "on_progress": on_progress}
    if task.job is not None:
        return prepare.warm(task.job, cache, pin=task.pin, label=task.name, **options)  # type: ignore[arg-type]
    assert task.run is not None, "a task of nothing"
    return prepare.warm_run(task.run, cache, **options)  # type: ignore[arg-type]


def _verify(cache: Cache, task: Task) -> int:
    """Read back what is on disk of a job's data: how many chunks are damaged, which go."""
    from fastload.client.operator import Operator

    damaged_chunks = 0
    with cache._handle.consumer(name="verify"), Operator.connect(cache.directory, "verify") as operator:
        for verified in operator.verify(_names_of(task), repair=True):
            damaged_chunks = verified.damaged_chunks
    return damaged_chunks


def _names_of(task: Task) -> list[str]:
    """As the service knows them."""
    from fastload.client.cache import named
    from fastload.store import normalise

    assert task.job is not None, "what a run read is not verified"
    return named([normalise(url) for url in task.job.urls])


def _verified_text(damaged_chunks: int, what: str = "which jobs would fetch again") -> str:
    if not damaged_chunks:
        return "What is on disk was read back, and is sound."
    return f"What is on disk was read back: {damaged_chunks} chunks were damaged, {what}."


def _result_text(task: Task, warmed: Warmed) -> str:
    if task.job is None:
        gone = f", {warmed.missing_count} are gone" if warmed.missing_count else ""
        what = f"{warmed.object_count} objects{gone}"
    else:
        what = f"{warmed.object_count} shards, {warmed.sample_count} samples"
    stored_bytes = warmed.stored_bytes * warmed.fetched_bytes // max(1, warmed.total_bytes)
    packed = _packed_text(stored_bytes, bool(stored_bytes) and warmed.stored_bytes != warmed.total_bytes)
    return (
        f"{what}: {format_bytes(warmed.held_bytes)} of {format_bytes(warmed.total_bytes)} cached, "
        f"{format_bytes(warmed.fetched_bytes)} fetched{packed}"
    )


def _values(task: Task, warmed: Warmed) -> dict[str, Any]:
    return {
        "name": task.name or None,
        "shards": warmed.object_count,
        "samples": warmed.sample_count,
        "missing": warmed.missing_count,
        "total_bytes": warmed.total_bytes,
        "held_bytes": warmed.held_bytes,
        "fetched_bytes": warmed.fetched_bytes,
        "stored_bytes": warmed.stored_bytes,
        "failed": {url: f"{type(error).__name__}: {error}" for url, error in warmed.failed.items()},
    }


def _progress_values(task: Task) -> dict[str, Any]:
    """Of one that was stopped."""
    progress = task.progress
    assert progress is not None, "it has not begun"
    return {
        "name": task.name or None,
        "total_bytes": progress.total_bytes,
        "held_bytes": progress.held_bytes,
        "fetched_bytes": progress.fetched_bytes,
    }


def _stopped_text(left: Sequence[Task]) -> str:
    """What is held of the one that was stopped."""
    if not left or left[0].progress is None:
        return "Stopped before anything was fetched of what was to come."
    progress = left[0].progress
    held = f"{format_bytes(progress.held_bytes)} of {format_bytes(progress.total_bytes)}"
    return _named(left[0], f"Stopped: {held} are held, and stay; the same command goes on from there.")


def _say(console: Console, text: str) -> None:
    console.print(plain(text), soft_wrap=True, markup=False, highlight=False)
