"""`fastload checkpoint`: what is saved below a URL, whether it is whole, what is in it; exported, and deleted.

All of it asks the store itself: no service takes part. What deletes asks first, unless `--yes` says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fastload.cli import exits
from fastload.cli.cache_options import shown
from fastload.cli.printing import JsonOption, examples, plain, print_json, print_table
from fastload.cli.view import duration
from fastload.config import format_bytes, parse_bytes, parse_seconds
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.checkpoint.attempts import Place
    from fastload.checkpoint.retention import Pruned

app = typer.Typer(help="Checkpoints: what is there, and whether it is whole.", rich_markup_mode=None)

Url = Annotated[str, typer.Argument(help="A checkpoint, such as s3://bucket/run/1200 or a file of safetensors.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command("ls", epilog=examples("fastload checkpoint ls s3://bucket/run", "fastload checkpoint ls /ckpt --json"))
def list_checkpoints(
    url: Annotated[str, typer.Argument(help="A run, or any folder above checkpoints.")], as_json: JsonOption = False
) -> None:
    """The checkpoints below a URL, and what saves left that were not committed. Exits with 3 where there are none."""
    from fastload.checkpoint.inventory import rows

    with _opened(url) as place:
        found = rows(place)
    if as_json:
        print_json(found)
    elif found:
        now = time.time()
        columns = "checkpoint", "state", ">size", ">besides", ">attempts", ">metric", ">"
        print_table(
            columns,
            (
                (
                    each.name or ".",
                    each.state,
                    format_bytes(each.bytes) if each.bytes else "",
                    format_bytes(each.other_bytes) if each.other_bytes else "",
                    str(each.attempts or ""),
                    f"{each.metric:g}" if each.metric is not None else "",
                    f"{duration(now - each.at_s)} ago",
                )
                for each in found
            ),
        )
    if not found:
        _nothing_below(url)


@app.command("show", epilog=examples("fastload checkpoint show s3://bucket/run/1200"))
def show(url: Url, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: its tensors, and what is none."""
    from fastload.checkpoint.finding import found
    from fastload.checkpoint.gathering import size_of

    with found(url) as (_, there):
        tensors = [
            (name, dtype, shape, size_of(there, name), len(there.places(name)))
            for name, (dtype, shape) in there.tensors.items()
        ]
    values = [(name, encoding, len(data)) for name, (encoding, data) in there.values.items() if name]
    if as_json:
        fields = "name", "dtype", "shape", "bytes", "pieces"
        print_json(
            {
                "url": url,
                "ranks": there.rank_count,
                "tensors": [dict(zip(fields, each, strict=True)) for each in tensors],
                "values": [dict(zip(("name", "encoding", "bytes"), each, strict=True)) for each in values],
            }
        )
        return
    rows = [
        (name, dtype, "x".join(map(str, shape)), format_bytes(size), str(pieces))
        for name, dtype, shape, size, pieces in tensors
    ]
    rows += [(name, encoding, "", format_bytes(size), "") for name, encoding, size in values]
    print_table(("name", "dtype", "shape", ">size", ">pieces"), rows)
    total = sum(size for *_, size, _ in tensors)
    print(f"{len(tensors)} tensors, {format_bytes(total)}; {len(values)} other values; of {there.rank_count} ranks")


@app.command(
    "verify",
    epilog=examples("fastload checkpoint verify s3://bucket/run/1200", "fastload checkpoint verify /ckpt --json"),
)
def verify(
    url: Annotated[str, typer.Argument(help="A checkpoint, or a run, of which all steps are verified.")],
    as_json: JsonOption = False,
) -> None:
    """Read all of a checkpoint, and compare it with its checksums. Exits with 4 where something is damaged."""
    from fastload.checkpoint.inventory import verified

    console = Console(stderr=True)
    with _opened(url) as place, shown(console, "verifying") as bar:
        found = verified(place, bar.show)
    if as_json:
        print_json(found)
    else:
        for each in found:
            for line in each.damaged:
                print(f"damaged: {plain(line)}")
        damaged = sum(bool(each.damaged) for each in found)
        read = sum(each.bytes for each in found)
        bare = sum(each.unchecked_bytes for each in found)
        said = f"; {format_bytes(bare)} have no checksums, and only their headers were checked" if bare else ""
        print(f"{len(found)} checkpoints, {format_bytes(read)} read, {damaged} damaged{said}")
    if any(each.damaged for each in found):
        raise typer.Exit(exits.DAMAGED)


@app.command(
    "export",
    epilog=examples(
        "fastload checkpoint export s3://bucket/run/1200 model.safetensors --part=model",
        "fastload checkpoint export s3://bucket/run/1200 /models/mine --to=hf --part=model",
        "fastload checkpoint export s3://bucket/run/1200 /ckpt/1200 --to=dcp",
        "fastload checkpoint export s3://bucket/run/1200 s3://bucket/models/mine --part=model",
    ),
)
def export(
    url: Url,
    target: Annotated[
        str, typer.Argument(help="A file or folder, also of a store; for that it is made in TMPDIR first.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="safetensors (a file), hf (a folder of them), dcp (torch's own); else by TARGET's name."),
    ] = None,
    part: Annotated[
        str, typer.Option(help="Only what is below this name, which is left out of the names: model.")
    ] = "",
    shard_bytes: Annotated[str, typer.Option(help="The size of a file of hf at most.")] = "5GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="For dcp: read values that are pickles, which run code.")
    ] = False,
) -> None:
    """Write a checkpoint as other tools read it, in little memory. What is no tensor goes with dcp only."""
    from fastload.checkpoint import exporting
    from fastload.checkpoint.finding import found
    from fastload.store.urls import normalise, scheme

    kind = to or ("safetensors" if target.endswith(".safetensors") else "hf")
    if kind not in ("safetensors", "hf", "dcp"):
        raise ConfigError(f"--to={kind}: write safetensors, hf or dcp")
    limit = parse_bytes(shard_bytes, "--shard-bytes")
    if limit == 0:
        raise ConfigError(f"--shard-bytes={shard_bytes}: a file has at least 1 byte; leave it out for 5 GiB")
    console = Console(stderr=True)
    is_here = scheme(normalise(target)) == "file"
    path_of = nullcontext(Path(normalise(target))) if is_here else exporting.sent(target, kind, overwrite=overwrite)
    written = exporting.written_to(target)
    with written, found(url) as (place, there), path_of as path, shown(console, "exporting") as bar:
        if kind == "dcp":
            from fastload.checkpoint.to_dcp import to_dcp

            to_dcp(place, there, part, path, bar.show, overwrite=overwrite, allow_pickle=allow_pickle)
            left = 0
        else:
            called = exporting.called(there, part, place.folder)
            left = exporting.value_count(there, part)
            if kind == "hf":
                exporting.to_folder(place, there, called, path, bar.show, overwrite=overwrite, shard_bytes=limit)
            else:
                exporting.to_file(place, there, called, path, bar.show, overwrite=overwrite)
    others = f"; {left} values are no tensors, and are left out" if left else ""
    console.print(f"written to {plain(target)}{others}", soft_wrap=True, markup=False, highlight=False)


@app.command(
    "prune",
    epilog=examples(
        "fastload checkpoint prune s3://bucket/run --keep-last=3 --keep-every=1000 --dry-run",
        "fastload checkpoint prune s3://bucket/run --keep-last=3 --keep-best=2 --best-is=highest --yes",
    ),
)
def prune(
    url: Annotated[str, typer.Argument(help="A run, whose steps are the folders below it, or one checkpoint.")],
    keep_last: Annotated[int | None, typer.Option(help="Keep the newest so many steps.")] = None,
    keep_every: Annotated[int, typer.Option(help="Keep the steps that this divides.")] = 0,
    keep_best: Annotated[int, typer.Option(help="Keep so many steps with the best metric.")] = 0,
    best_is: Annotated[str, typer.Option(help="Whether the lowest or the highest metric is best.")] = "lowest",
    grace: Annotated[
        str, typer.Option(help="What saves that failed have left goes when it has not changed for so long.")
    ] = "1d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Yes = False,
    as_json: JsonOption = False,
) -> None:
    """Delete old steps of a run, and what saves that failed have left, also of one checkpoint. Without --keep-last no
    step goes.
    """
    from fastload.checkpoint import retention
    from fastload.checkpoint.retention import Keep

    grace_s, now_s = parse_seconds(grace, "--grace"), time.time()
    if keep_last is None and (keep_every or keep_best):
        raise ConfigError("--keep-every and --keep-best add to --keep-last; give that as well")
    keep = None if keep_last is None else Keep(last=keep_last, every=keep_every, best=keep_best, best_is=best_is)  # type: ignore[arg-type]
    with _opened(url) as place:
        going = retention.prune(place, keep, now_s=now_s, grace_s=grace_s, is_trial=True)
        going += retention.sweep(place, now_s=now_s, grace_s=grace_s, is_trial=True)
        if not dry_run:
            if going.objects:
                _ask(yes, f"delete {_listed(going.steps)} of {url}, {going.objects} objects in all")
            # Those that were shown, and no others that have come to be old meanwhile.
            going = retention.prune(place, None, now_s=now_s, grace_s=grace_s, steps=going.steps)
            going += retention.sweep(place, now_s=now_s, grace_s=grace_s)
    _say(going, as_json, would=dry_run)


@app.command("rm", epilog=examples("fastload checkpoint rm s3://bucket/run/1200 s3://bucket/run/1300"))
def remove(
    urls: Annotated[list[str], typer.Argument(help="Checkpoints, such as steps of a run.")],
    yes: Yes = False,
    as_json: JsonOption = False,
) -> None:
    """Delete checkpoints. What other steps of their run refer to stays."""
    from fastload.checkpoint import retention

    _ask(yes, f"delete {', '.join(urls)}")
    removed = []
    for url in urls:
        with _opened(url) as place:
            gone = retention.remove(place)
        removed.append({"url": url, "objects": gone.objects, "bytes": gone.bytes})
        if not as_json:
            print(f"gone: {plain(url)}, {gone.objects} objects, {format_bytes(gone.bytes)}")
    if as_json:
        print_json(removed)


@app.command("repair", epilog=examples("fastload checkpoint repair s3://bucket/run"))
def repair(
    url: Annotated[str, typer.Argument(help="A checkpoint, or a run, whose steps are repaired.")],
    as_json: JsonOption = False,
) -> None:
    """Commit what was saved whole by processes that ended before they could commit it. Exits with 3 where there is
    nothing at all.
    """
    from fastload.checkpoint import attempts
    from fastload.checkpoint.attempts import Place
    from fastload.checkpoint.inventory import rows

    done = []
    with _opened(url) as place:
        there = rows(place)
        for row in there:
            if row.attempts:
                folder = Place(place.store, f"{place.folder}{row.name}/" if row.name else place.folder)
                attempt = attempts.repair(folder)
                if attempt is not None:
                    done.append({"checkpoint": folder.folder, "attempt": attempt})
    if as_json:
        print_json(done)
    else:
        for each in done:
            print(f"committed: {plain(each['checkpoint'])}")
        if there and not done:
            print("nothing had to be repaired")
    if not there:
        _nothing_below(url)


# What they share


@contextmanager
def _opened(url: str) -> Iterator[Place]:
    from fastload.checkpoint.attempts import opened

    with opened(url, None) as place:
        yield place


def _nothing_below(url: str) -> NoReturn:
    print(f"fastload: no checkpoint is below {plain(url)}", file=sys.stderr)
    raise typer.Exit(exits.PARTIAL)


def _ask(yes: bool, what: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"to {what}, pass --yes, since there is no terminal to ask at")
    typer.confirm(f"{what[0].upper()}{what[1:]}?", abort=True, err=True)


def _listed(steps: list[int]) -> str:
    some = ", ".join(map(str, steps[:10])) + (" and so on" if len(steps) > 10 else "")
    return f"{len(steps)} steps" + (f" ({some})" if steps else "")


def _say(pruned: Pruned, as_json: bool, *, would: bool) -> None:
    if as_json:
        print_json(pruned)
    else:
        verb = "would go" if would else "gone"
        print(f"{verb}: {_listed(pruned.steps)}, {pruned.objects} objects, {format_bytes(pruned.bytes)}")
