"""`fastload status`: what a node's cache holds and does now, in a screenful. Looking starts nothing."""

from __future__ import annotations

from fastload.cli.cache_options import CachePath, cache_directory
from fastload.cli.printing import JsonOption, print_json
from fastload.cli.view import as_lines


def status(cache: CachePath = None, as_json: JsonOption = False) -> None:
    """What the cache holds and does now: tiers, stores, data sets, warming jobs, who reads and what they wait for.

    Exits with 3 where no service runs for the directory.
    """
    from fastload.client.operator import Operator

    with Operator.connect(cache_directory(cache), "status") as operator:
        snapshot = operator.snapshot()
    if as_json:
        print_json(snapshot)
        return
    for line in as_lines(snapshot):
        print(line)
