"""`fastload doctor`: whether this node can feed a job, checked one thing after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastload.cli import exits
from fastload.cli.cache_options import CachePath, cache_directory
from fastload.cli.printing import JsonOption, plain, print_json

if TYPE_CHECKING:
    from fastload.cli.checks import Check


def doctor(
    urls: Annotated[
        list[str] | None, typer.Argument(help="Data that a job is to read: patterns, prefixes, shards.")
    ] = None,
    cache: CachePath = None,
    profile: Annotated[str | None, typer.Option(help="The profile in ~/.aws whose credentials the job uses.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the machine, the cache's directory and service, and how each URL is read; say how to mend what is wrong.

    Exits with 1 where something would fail. A little is written to the cache's disk and read back, and removed.
    """
    from fastload.cli import checks

    found = []
    for url in ["", *(urls or [])]:
        group = checks.of_store(url, profile) if url else checks.of_node(cache_directory(cache))
        for check in group:
            found.append(checks.shown(check._replace(url=url)))
            if not as_json:
                print(_line(found[-1]), flush=True)
    if as_json:
        print_json([check._asdict() for check in found])
    if any(check.state == "fail" for check in found):
        raise typer.Exit(exits.FAILED)


def _line(check: Check) -> str:
    cure = f"; {check.cure}" if check.cure else ""
    return f"{check.state:<4}  {check.name:<11}  {plain(check.says + cure)}"
