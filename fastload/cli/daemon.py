"""`fastload daemon`: serve a cache for good, and keep in it what a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastload.cli.cache_options import CachePath


def daemon(
    config: Annotated[
        Path | None, typer.Option(help="What to warm and to keep, as TOML; see docs/operations.md.")
    ] = None,
    cache: CachePath = None,
) -> None:
    """Serve the cache until SIGTERM, and warm what the configuration and `fastload warm --daemon` name.

    SIGHUP reads the configuration again.
    """
    from fastload.daemon.process import run

    run(cache, config)
