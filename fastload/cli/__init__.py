"""The command line: `fastload VERB`, one thin module a verb."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import fastload
from fastload.cli import (
    bench,
    cache,
    checkpoint,
    daemon,
    demo,
    doctor,
    exits,
    history,
    index,
    jobs,
    schema,
    simulate,
    status,
    top,
    warm,
)
from fastload.cli import compile as kernels
from fastload.cli.printing import examples, plain
from fastload.errors import FastloadError


class _Verbs(TyperGroup):
    """In alphabetical order. Where Ctrl-C ends a verb, that is said in one line when it has cleaned up."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("fastload: interrupted", file=sys.stderr)
            raise typer.Exit(exits.INTERRUPTED) from None


# Help and usage errors are plain text: the same in a pipe, with nothing cut off to fit a frame.
app = typer.Typer(
    cls=_Verbs,
    help="fastload: feed training jobs from object storage through a cache on the node.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _add(
    verb: str, function: Callable[..., Any], short: str, *lines: str, cls: type[TyperCommand] = TyperCommand
) -> None:
    """A verb, with what it does in a few words, and examples of its use."""
    app.command(verb, cls=cls, short_help=short, epilog=examples(*lines))(function)


app.add_typer(bench.app, name="bench", short_help="How fast this data can be fed here, and what limits it.")
app.add_typer(cache.app, name="cache", short_help="What a cache holds, keeps and loses.")
app.add_typer(checkpoint.app, name="checkpoint", short_help="What is saved, whether it is whole; exported, deleted.")
_add(
    "compile",
    kernels.compile_kernels,
    "Compile the kernels before any job runs.",
    "fastload compile",
    "fastload compile --status",
    "fastload compile --to=/opt/fastload-kernels",
)
_add(
    "daemon",
    daemon.daemon,
    "Serve the cache for good, and warm it.",
    "fastload daemon",
    "fastload daemon --config=/etc/fastload.toml",
)
_add("demo", demo.demo, "Train a small network on real photographs, here.", "fastload demo --epochs=1")
_add(
    "doctor",
    doctor.doctor,
    "What is wrong here, and how to mend it.",
    "fastload doctor",
    "fastload doctor s3://bucket/train/ --cache=/nvme/fastload",
    "fastload doctor 's3://bucket/train-{0000..0099}.tar' --json",
)
app.add_typer(history.app, name="history", short_help="Runs that a cache remembers.")
_add(
    "index",
    index.index,
    "Index all shards of a data set.",
    "fastload index 's3://bucket/train-{0000..0099}.tar' --output=train.arrow",
)
app.add_typer(jobs.app, name="jobs", short_help="The warming jobs of the daemon.")
_add(
    "schema",
    schema.schema,
    "Which columns a data set has.",
    "fastload schema s3://bucket/mds/",
    "fastload schema s3://bucket/tokens/ --format='tokens(2048, uint16)' --json",
)
_add(
    "simulate",
    simulate.simulate,
    "How large a cache to buy, in virtual time.",
    "fastload simulate --data-bytes=10TB --nodes=100 --cache-bytes=10%,50%,100%",
)
_add(
    "status",
    status.status,
    "What the cache holds and does now.",
    "fastload status",
    "fastload status --cache=/nvme/fastload --json",
    "fastload status --open",
)
_add("top", top.top, "Watch the cache, each second.", "fastload top", "fastload top --count=60 --json | gzip")
_add(
    "warm",
    warm.warm,
    "Fill the cache for a job.",
    "fastload warm 's3://bucket/train-{0000..0099}.tar' --seed=3",
    "fastload warm s3://bucket/train/ --cache=/nvme/fastload --node=2 --nodes=8",
    "fastload warm --from-history=latest",
    "fastload warm --job=mixture.toml --pin --ttl=14d --bandwidth=200MB/s",
    "fastload warm s3://bucket/train/ --check --json",
    cls=warm.WarmCommand,
)


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
    """The `fastload` command: our own errors are one line on stderr; `exits` has the codes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # what a test put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            app(prog_name="fastload")
        finally:
            sys.stdout.flush()
    except FastloadError as error:
        print(f"fastload: {type(error).__name__}: {plain(str(error))}", file=sys.stderr)
        sys.exit(_code_of(error))
    except BrokenPipeError:  # who read what we print has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exits.FAILED)
    except KeyboardInterrupt:  # before a verb began
        sys.exit(exits.INTERRUPTED)


def _code_of(error: FastloadError) -> int:
    from fastload.client.operator import NotServedError
    from fastload.errors import CheckpointDamagedError

    if isinstance(error, CheckpointDamagedError):
        return exits.DAMAGED
    return exits.PARTIAL if isinstance(error, NotServedError) else exits.FAILED
