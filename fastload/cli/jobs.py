"""`fastload jobs`: what the daemon warms, and steering that."""

from __future__ import annotations

import typer

app = typer.Typer(help="The warming jobs of the daemon.", no_args_is_help=True)
