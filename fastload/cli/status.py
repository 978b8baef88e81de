"""`fastload status`: what a node's cache holds and does now, in a screenful. It starts nothing; `--open`, the page."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastload.cli.cache_options import CachePath, cache_directory
from fastload.cli.printing import JsonOption, print_json
from fastload.cli.view import as_lines

# A page that was started here ends so long after its last browser: it keeps the last hour.
_PAGE_IDLE_S = 3600.0

OpenOption = Annotated[
    bool, typer.Option("--open", help="Instead: start the page, where none runs, and print its address for a browser.")
]


def status(cache: CachePath = None, as_json: JsonOption = False, as_page: OpenOption = False) -> None:
    """What the cache holds and does now: tiers, stores, data sets, warming jobs, who reads and what they wait for.

    Exits with 3 where no service runs for the directory.
    """
    from fastload.client.operator import Operator

    directory = cache_directory(cache)
    if as_page:
        _show_page(directory, as_json)
        return
    with Operator.connect(directory, "status") as operator:
        snapshot = operator.snapshot()
    if as_json:
        print_json(snapshot)
        return
    for line in as_lines(snapshot):
        print(line)


def _show_page(directory: Path, as_json: bool) -> None:
    """The address is only printed: started with it, a browser would show the token to all users of the machine, in the
    list of processes.
    """
    from fastload.page import start

    page = start(directory, idle_s=_PAGE_IDLE_S)
    if as_json:
        print_json({"url": page.url, "listen": page.listen, "pid": page.pid})
        return
    print(page.url, flush=True)
    if os.environ.get("SSH_CONNECTION") and sys.stderr.isatty():
        port = page.host.rpartition(":")[2]
        at = page.listen.removeprefix("unix:")
        print(f"from your machine, first: ssh -N -L {port}:{at} {socket.gethostname()}", file=sys.stderr)
