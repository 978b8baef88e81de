"""`fastload cache`: what a cache holds, by name; and what is kept, removed and checked.

`ls` and `du` read the directory's files, and `verify` without `--repair` does so where no service runs: none of these
starts or changes anything. The others ask the directory's service. Where none runs, `evict`, `clear`, `unpin` and
`verify --repair` serve the directory themselves for the time; `pin` starts the service, as a job does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.cli import exits
from fastload.cli.cache_options import CachePath, FormatOption, existing_cache, shown
from fastload.cli.printing import JsonOption, examples, plain, print_json, print_table
from fastload.cli.view import duration
from fastload.config import format_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.cache.contents import Contents
    from fastload.client.operator import Operator

app = typer.Typer(help="What a cache holds; and what is kept, removed and checked.", rich_markup_mode=None)

What = Annotated[
    list[str] | None,
    typer.Argument(
        help="URLs, brace patterns, prefixes that end in '/', data sets or pins; all of it where none is named."
    ),
]
SomeOfIt = Annotated[
    list[str], typer.Argument(help="URLs, brace patterns, prefixes that end in '/', data sets or pins.")
]


@app.command("ls", epilog=examples("fastload cache ls", "fastload cache ls s3://bucket/train/ --json"))
def list_objects(what: What = None, cache: CachePath = None, as_json: JsonOption = False) -> None:
    """The objects that are on disk or pinned, by URL. Exits with 3 where there are none."""
    contents = _contents(_directory(cache))
    found = contents.called(_named(what))
    if as_json:
        print_json(found)
    elif found:
        now = time.time()
        rows = (
            (
                format_bytes(each.disk_bytes),
                format_bytes(each.size) if each.size >= 0 else "?",
                "pinned" if each.pins else "",
                _ago(now, each.used_at),
                each.data_set,
                each.url or each.object_id,
            )
            for each in found
        )
        print_table((">on disk", ">of", "", ">used", "data set", "object"), rows)
    _end(contents, is_found=bool(found))


@app.command("du", epilog=examples("fastload cache du", "fastload cache du --cache=/nvme/fastload --json"))
def data_sets(cache: CachePath = None, as_json: JsonOption = False) -> None:
    """How much is held of each data set; in RAM as well, where a service runs. Exits with 3 where nothing is held."""
    from msgspec.structs import replace

    from fastload.cache.contents import by_data_set
    from fastload.client.operator import NotServedError, Operator

    directory = _directory(cache)
    contents = _contents(directory)
    rows = by_data_set(contents.held)
    try:
        with Operator.connect(directory, "cache du") as operator:
            in_ram = {row.name: row for row in operator.snapshot().data_sets if row.ram_bytes}
    except NotServedError:
        in_ram = {}
    rows = [replace(row, ram_bytes=in_ram.pop(row.name).ram_bytes) if row.name in in_ram else row for row in rows]
    rows += in_ram.values()
    if as_json:
        print_json(rows)
    elif rows:
        now = time.time()
        print_table(
            ("data set", ">objects", ">size", ">in RAM", ">on disk", ">pinned", ">used"),
            (
                (
                    row.name,
                    f"{row.object_count:,}",
                    format_bytes(row.byte_count),
                    format_bytes(row.ram_bytes),
                    format_bytes(row.disk_bytes),
                    format_bytes(row.pinned_bytes),
                    _ago(now, row.last_use_at),
                )
                for row in rows
            ),
        )
    _end(contents, is_found=bool(rows))


@app.command(
    "pin",
    epilog=examples(
        "fastload cache pin 's3://bucket/train-{0000..0099}.tar' --name=train --ttl=14d",
        "fastload cache pin s3://bucket/val/ --quota=100GiB",
    ),
)
def pin(
    urls: Annotated[list[str], typer.Argument(help="Brace patterns, prefixes that end in '/', or single objects.")],
    name: Annotated[
        str | None, typer.Option(help="What to call the pin; else the URLs. One of that name is replaced.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(help="How long after its last use it ends, such as 14d; else never.")
    ] = None,
    quota: Annotated[str | None, typer.Option(help="The most that it may name, such as 1TiB.")] = None,
    format_name: FormatOption = "auto",
    cache: CachePath = None,
    as_json: JsonOption = False,
) -> None:
    """Keep objects on disk, whatever jobs read, as the store has them. A pin fetches nothing; `fastload warm --pin`
    does both, and is the way to pin what a data set reads of packed files, which is what is in them.
    """
    from fastload.client.cache import Cache

    with Cache(cache) as opened:
        byte_count = opened.pin(urls, name=name, ttl=ttl, quota=quota, format=format_name)
    if as_json:
        print_json({"byte_count": byte_count})
    else:
        print(f"pinned: {format_bytes(byte_count)}")


@app.command("unpin", epilog=examples("fastload cache unpin train", "fastload cache unpin s3://bucket/val/"))
def unpin(what: SomeOfIt, cache: CachePath = None, as_json: JsonOption = False) -> None:
    """End pins by name, or take objects out of all pins. Exits with 3 where no pin is called so, or names any of it."""
    with _served(cache, "cache unpin") as operator:
        values = operator.unpin(_named(what))
    if as_json:
        print_json(values)
    else:
        names = ", ".join(map(plain, values["names"])) or "nothing"
        print(f"unpinned: {names} ({format_bytes(values['byte_count'])})")
    if not values["names"]:
        raise typer.Exit(exits.PARTIAL)


@app.command("evict", epilog=examples("fastload cache evict s3://bucket/old/", "fastload cache evict imagenet"))
def evict(what: SomeOfIt, cache: CachePath = None, as_json: JsonOption = False) -> None:
    """Remove objects from RAM and disk. What jobs read just now, and what is pinned, stays: then it exits with 3, as
    where nothing is called so.
    """
    with _served(cache, "cache evict") as operator:
        values = operator.evict(_named(what))
    if as_json:
        print_json(values)
    else:
        print(f"evicted: {format_bytes(values['freed_bytes'])}")
        if values["in_use_bytes"]:
            print(f"in use, and still there: {format_bytes(values['in_use_bytes'])}")
        if values["pinned_bytes"]:
            print(
                f"pinned, and still there: {format_bytes(values['pinned_bytes'])}; `fastload cache unpin` comes first"
            )
    if not values["freed_bytes"] or values["in_use_bytes"] or values["pinned_bytes"]:
        raise typer.Exit(exits.PARTIAL)


@app.command("clear", epilog=examples("fastload cache clear", "fastload cache clear --pins --history"))
def clear(
    pins: Annotated[bool, typer.Option("--pins", help="End all pins first, so that what they kept goes too.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Forget what runs read as well.")] = False,
    cache: CachePath = None,
    as_json: JsonOption = False,
) -> None:
    """Empty the cache, save for what jobs read just now, and what is pinned."""
    with _served(cache, "cache clear") as operator:
        freed = operator.clear(history=history, pins=pins)
    if as_json:
        print_json({"freed_bytes": freed})
    else:
        print(f"cleared: {format_bytes(freed)}")


@app.command("verify", epilog=examples("fastload cache verify", "fastload cache verify s3://bucket/train/ --repair"))
def verify(
    what: What = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged, so that it is fetched again.")
    ] = False,
    cache: CachePath = None,
    as_json: JsonOption = False,
) -> None:
    """Read what is on disk, and check it. Exits with 4 where something is damaged, also where that was removed."""
    from fastload.client.operator import NotServedError, Operator

    names, directory = _named(what), _directory(cache)
    contents = _contents(directory)
    url_of = {each.object_id: each.url for each in contents.held}
    console = Console(stderr=True)
    damaged: list[str] = []
    done = skipped = 0
    with shown(console, "verifying", "chunks") as bar:
        try:
            with _served(cache, "cache verify") if repair else Operator.connect(directory, "cache verify") as operator:
                for state in operator.verify(names, repair=repair):
                    bar.show(state.done_chunks, state.total_chunks)
                    damaged += state.damaged
                    done, skipped = state.done_chunks, state.skipped_chunks
        except NotServedError:
            done = 0
            for chunk, total, is_whole in _verify_files(directory, contents, names):
                done += 1
                skipped += is_whole is None
                damaged += [chunk] if is_whole is False else []
                bar.show(done, total)
    found = [{"chunk": name, "url": url_of.get(name.partition("-")[0], "")} for name in damaged]
    if as_json:
        print_json({"chunk_count": done, "skipped_chunks": skipped, "is_repaired": repair, "damaged": found})
    else:
        for each in found:
            print(f"damaged{', and removed' if repair else ''}: {plain(each['url'])} (chunk {each['chunk']})")
        cure = (
            "" if repair or not found else "; `fastload cache verify --repair` removes them, and they are fetched again"
        )
        gone = f", {skipped} were gone or could not be read" if skipped else ""
        print(f"{done} chunks checked, {len(found)} damaged{gone}{cure}")
    if found:
        raise typer.Exit(exits.DAMAGED)
    if skipped or not done:
        raise typer.Exit(exits.PARTIAL)


def _verify_files(directory: Path, contents: Contents, what: list[str]) -> Iterator[tuple[str, int, bool | None]]:
    """Each chunk on disk of what is called so: its name, how many there are, and whether it is whole (None: gone)."""
    import mmap

    from fastload.cache import limits
    from fastload.cache.chunkfile import ChunkDamagedError, read_into
    from fastload.cache.disk import path_in

    ids = {each.object_id for each in contents.called(what)}
    keys = [key for key in contents.keys + contents.cut if not what or key.object_id.hex() in ids]
    stored = limits.stored(directory)
    if stored is None:
        return
    with mmap.mmap(-1, stored.chunk_bytes) as scratch, memoryview(scratch) as view:
        for key in keys:
            is_whole: bool | None = True
            try:
                read_into(path_in(directory, key), key, view)
            except FileNotFoundError:
                is_whole = None
            except (ChunkDamagedError, OSError):
                is_whole = False
            yield key.name, len(keys), is_whole


def damaged_in(directory: Path, what: list[str]) -> int:
    """How many chunks on disk are damaged of what is called so. Changes and starts nothing; the directory need not be
    there.
    """
    from fastload.client.operator import NotServedError, Operator

    damaged_chunks = 0
    try:
        with Operator.connect(directory, "verify") as operator:
            for verified in operator.verify(what, repair=False):
                damaged_chunks = verified.damaged_chunks
    except NotServedError:
        if directory.exists():
            checked = _verify_files(directory, _contents(directory), what)
            damaged_chunks = sum(is_whole is False for *_, is_whole in checked)
    return damaged_chunks


# What they share


@contextmanager
def _served(cache: Path | None, name: str) -> Iterator[Operator]:
    """Connected to the directory's service: the one that runs, or else one in this process for the time."""
    from fastload.client.cache import Handle
    from fastload.client.operator import NotServedError, Operator

    directory = _directory(cache)
    try:
        operator = Operator.connect(directory, name)
    except NotServedError:
        pass
    else:
        with operator:
            yield operator
        return
    with (
        Handle(directory, service="inprocess") as handle,
        handle.consumer(name=name),
        Operator.connect(directory, name) as operator,
    ):
        yield operator


def _directory(cache: Path | None) -> Path:
    """ConfigError where there is no cache, also by default: none of these verbs makes one."""
    from fastload.cache import limits

    path = existing_cache(cache)
    if not limits.path_of(path).exists():
        raise ConfigError(f"there is no cache at {path}; name one with --cache, or FASTLOAD_CACHE")
    return path


def _contents(directory: Path) -> Contents:
    from fastload.cache.contents import read_contents
    from fastload.cache.directory import opened

    with opened(directory) as root:
        return read_contents(root, directory)


def _named(what: list[str] | None) -> list[str]:
    from fastload.client.cache import named

    return named(what or [])


def _end(contents: Contents, *, is_found: bool) -> None:
    if contents.trouble:
        print(f"fastload: {plain(contents.trouble)}", file=sys.stderr)
    if not is_found:
        raise typer.Exit(exits.PARTIAL)


def _ago(now: float, at: float) -> str:
    return f"{duration(now - at)} ago" if at else ""
