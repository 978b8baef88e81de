"""The command line: `fastload VERB`, one thin module a verb."""

from __future__ import annotations

import sys

import typer

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


@app.callback()
def _verbs() -> None:
    """Feed training jobs from object storage through a cache on the node."""


def main() -> None:
    """The `fastload` command: errors of ours are one line on stderr and exit code 1."""
    try:
        app()
    except FastloadError as error:
        print(f"fastload: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
