"""The command line: `fastload VERB`, one thin module a verb."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import fastload
from fastload.cli import compile as kernels
from fastload.cli import demo, history, index, simulate, warm
from fastload.errors import FastloadError

app = typer.Typer(
    help="fastload: feed training jobs from object storage through a cache on the node.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(kernels.compile_kernels)
app.command("demo")(demo.demo)
app.add_typer(history.app, name="history")
app.command("index")(index.index)
app.command("simulate")(simulate.simulate)
app.command("warm")(warm.warm)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"fastload {fastload.__version__}")
        raise typer.Exit


@app.callback()
def _verbs(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Feed training jobs from object storage through a cache on the node."""


def main() -> None:
    """The `fastload` command: our own errors are one line on stderr and exit code 1."""
    try:
        app(prog_name="fastload")
    except FastloadError as error:
        print(f"fastload: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
