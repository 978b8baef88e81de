"""The child process of a daemon that warms for one job: `python -m fastload.daemon.job`.

The first line of its standard input is what to do (`Errand`), as JSON; no argument says anything. Then the daemon keeps
that pipe open, and its end is the daemon's: the child ends with it. On its standard output it says in lines of JSON how
far it is (`Advanced`), and at last what came of it (`Ended`). Otherwise it is an ordinary consumer of the cache: at any
moment it may be killed, and what it had the cache fetch is there.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from fastload.client.cache import Handle
from fastload.daemon.config import DataTable, storage_options_of
from fastload.daemon.jobs import Figures
from fastload.errors import FastloadError, ObjectMissingError
from fastload.protocol import Progress, WarmTerms
from fastload.redaction import redact
from fastload.service.host.logs import log_to_stderr
from fastload.store.listing import expand

log = logging.getLogger("fastload.service")

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_SAY_EVERY_S = 0.25
# Work of the trainers comes first, also where shards are indexed.
_NICE = 10


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to do. `deadline_at`: seconds since 1970, 0 for none. `is_check`: only say what is held."""

    directory: str
    table: DataTable
    deadline_at: float = 0.0
    is_check: bool = False


class Advanced(msgspec.Struct, frozen=True, kw_only=True, tag="advanced"):
    """How far it is."""

    figures: Figures


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """What came of it; `error` is empty where all but single shards are held."""

    figures: Figures
    error: str = ""


Said = Advanced | Ended


def main() -> int:
    """Do what standard input says; 0 once that was said how it went."""
    errand = msgspec.json.decode(_read_line(), type=Errand)
    said = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)  # whatever else a library may print
    os.nice(_NICE)
    log_to_stderr(redact(errand.table.name))
    threading.Thread(target=_end_with_daemon, name="fastload-daemon-watch", daemon=True).start()

    def say(message: Said) -> None:
        os.write(said, msgspec.json.encode(message) + b"\n")

    try:
        figures = _warm(errand, lambda figures: say(Advanced(figures=figures)))
    except FastloadError as error:
        say(Ended(figures=Figures(), error=f"{type(error).__name__}: {error}"))
    else:
        say(Ended(figures=figures))
    return 0


def _read_line() -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        piece = os.read(_STDIN, 1 << 16)
        if not piece:
            sys.exit("no job on standard input; `fastload daemon` starts this")
        data += piece
    return data


def _end_with_daemon() -> None:
    while os.read(_STDIN, 1):
        pass
    os._exit(1)


def _warm(errand: Errand, advanced: Callable[[Figures], None]) -> Figures:
    table = errand.table
    options = storage_options_of(table.credentials)
    with Handle(errand.directory) as handle:
        try:
            return _warm_urls(errand, table.urls, handle, options, {}, advanced)
        except ObjectMissingError:  # members of a pattern, which hold up no others
            there, gone = _sorted_out(table.urls, handle, options)
            if not there or not gone:
                raise
            return _warm_urls(errand, there, handle, options, gone, advanced)


def _sorted_out(urls: list[str], handle: Handle, options: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Of what `urls` name one by one, what is there, in their order, and what is not; prefixes stay as they are."""
    names = [name for url in urls for name in expand(url)]
    with handle.consumer(options, "warm") as consumer:
        present = {info.url for info in consumer.present([name for name in names if not name.endswith("/")])}
    gone = [name for name in names if not name.endswith("/") and name not in present]
    not_there = set(gone)
    there = [name for name in names if name not in not_there]
    return there, {redact(name): "it is not there" for name in gone}


def _warm_urls(
    errand: Errand,
    urls: list[str],
    handle: Handle,
    options: dict[str, Any],
    gone: dict[str, str],
    advanced: Callable[[Figures], None],
) -> Figures:
    from fastload import prepare

    table = errand.table
    job = table.job.warm_job(urls)
    if errand.is_check:
        found = prepare.look(job, handle.directory, storage_options=options)
        return Figures(
            done_bytes=found.total_bytes,
            total_bytes=found.total_bytes,
            held_bytes=found.held_bytes,
            shard_count=found.object_count,
        )
    pin = prepare.PinTerms(table.name, table.ttl_s or 0.0, table.quota_bytes or 0) if table.pin else None
    limiter = _Every(_SAY_EVERY_S)

    def on_progress(progress: Progress) -> None:
        if limiter.is_due():
            advanced(_figures(progress, gone))

    warmed = prepare.warm(
        job,
        handle,
        storage_options=options,
        terms=WarmTerms(table.bytes_per_s, table.priority, errand.deadline_at, goes_on=True),
        pin=pin,
        label=table.name,
        on_progress=on_progress,
    )
    return Figures(
        done_bytes=warmed.total_bytes,
        total_bytes=warmed.total_bytes,
        held_bytes=warmed.held_bytes,
        fetched_bytes=warmed.fetched_bytes,
        shard_count=warmed.object_count + len(gone),
        failed={**gone, **{url: f"{type(error).__name__}: {error}" for url, error in warmed.failed.items()}},
    )


def _figures(progress: Progress, failed: dict[str, str]) -> Figures:
    return Figures(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        held_bytes=progress.held_bytes,
        fetched_bytes=progress.fetched_bytes,
        failed=failed,
    )


class _Every:
    """Says at most so often that something is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._at = seconds, -math.inf

    def is_due(self) -> bool:
        now = time.monotonic()
        is_due = now - self._at >= self._seconds
        self._at = now if is_due else self._at
        return is_due


if __name__ == "__main__":
    sys.exit(main())
