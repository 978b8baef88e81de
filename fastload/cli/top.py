"""`fastload top`: what a node's cache does, each second, until Ctrl-C.

In a terminal it is a screen of its own, which is gone at the end; in a pipe a line each second. A service that ends
ends nothing here: the next one is watched as soon as it is there.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastload.cli import exits
from fastload.cli.cache_options import CachePath, cache_directory
from fastload.cli.printing import JsonOption, plain, print_json
from fastload.cli.view import as_line, as_lines
from fastload.errors import FastloadError
from fastload.snapshot import Snapshot

Show = Callable[[Snapshot | None, Snapshot | FastloadError], None]


def top(
    cache: CachePath = None,
    count: Annotated[int, typer.Option(min=0, help="End after so many seconds; 0: with Ctrl-C.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Watch the cache: rates by tier and consumer, and what each waits for, each second.

    Exits with 3 where no service runs. One that is restarted meanwhile is waited for.
    """
    from fastload.client.operator import Operator, follow

    directory = cache_directory(cache)
    Operator.connect(directory, "top").close()
    signal.signal(signal.SIGTERM, _end)
    before: Snapshot | None = None
    with _shown(as_json) as show:
        for now in islice(follow(directory, "top"), count or None):
            show(before, now)
            before = now if isinstance(now, Snapshot) else before


def _end(*_: object) -> None:
    """By a signal, but with the terminal as it was."""
    sys.exit(exits.TERMINATED)


@contextmanager
def _shown(as_json: bool) -> Iterator[Show]:
    console = Console()
    if as_json:
        yield lambda _, now: print_json(now if isinstance(now, Snapshot) else {"error": str(now)}, indent=None)
    elif not console.is_terminal or console.is_dumb_terminal:
        yield lambda before, now: print(_line(before, now), flush=True)
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            yield lambda before, now: live.update(_screen(before, now, console.width), refresh=True)


def _line(before: Snapshot | None, now: Snapshot | FastloadError) -> str:
    said = as_line(now, before) if isinstance(now, Snapshot) else _waiting(now)
    return f"{_clock(time.time())}  {said}"


def _screen(before: Snapshot | None, now: Snapshot | FastloadError, width: int) -> Text:
    """What does not fit the terminal is cut, but for sentences."""
    if isinstance(now, Snapshot):
        lines = [f"fastload top  {_clock(now.at)}  (Ctrl-C ends it)", "", *as_lines(now, before, width)]
    else:
        last = [] if before is None else ["", f"As it was at {_clock(before.at)}:", "", *as_lines(before, width=width)]
        lines = [f"fastload top  {_waiting(now)}", *last]
    screen = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
    screen.stylize("bold", 0, len(lines[0]))
    return screen


def _waiting(error: FastloadError) -> str:
    return f"waiting for a service: {plain(str(error))}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
