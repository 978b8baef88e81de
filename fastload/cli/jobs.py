"""`fastload jobs`: what the daemon warms, and steering that. `status` shows the same beside the rest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastload.cli.cache_options import CachePath, cache_directory
from fastload.cli.printing import JsonOption, examples, plain, print_json, print_table
from fastload.cli.view import duration
from fastload.config import format_bytes
from fastload.errors import ConfigError
from fastload.snapshot import Job

if TYPE_CHECKING:
    from fastload.client.operator import Operator

app = typer.Typer(help="The warming jobs of the daemon. All verbs exit with 3 where none serves.")

Id = Annotated[str, typer.Argument(help="A job, by its id or name; see `fastload jobs ls`.")]


@app.command("ls", epilog=examples("fastload jobs ls", "fastload jobs ls --json"))
def list_jobs(cache: CachePath = None, as_json: JsonOption = False) -> None:
    """All jobs, the most urgent first."""
    jobs = _jobs(cache)
    if as_json:
        print_json(jobs)
        return
    if not jobs:
        print("The daemon has no jobs.")
        return
    columns = "job", "data set", "state", ">held", ">of", ">a second", ">left", ">failed", ""
    print_table(
        columns,
        (
            (
                job.id,
                job.name,
                job.state,
                format_bytes(job.held_bytes),
                format_bytes(job.total_bytes),
                f"{format_bytes(job.bytes_per_s)}/s" if job.bytes_per_s else "",
                duration(job.eta_s) if job.eta_s >= 0 else "",
                str(job.failed_shards or ""),
                job.error,
            )
            for job in jobs
        ),
    )


@app.command("show", epilog=examples("fastload jobs show imagenet", "fastload jobs show imagenet --json"))
def show_job(job: Id, cache: CachePath = None, as_json: JsonOption = False) -> None:
    """One job, with what is wrong with it."""
    jobs = _jobs(cache)
    found = next((each for each in jobs if job == each.id), None) or next(
        (each for each in jobs if job == each.name), None
    )
    if found is None:
        raise ConfigError(f"the daemon has no job {job!r}; `fastload jobs ls` lists those that it has")
    if as_json:
        print_json(found)
        return
    for name, value in _rows(found):
        print(f"{name + ':':<12} {plain(value)}")


@app.command("cancel", epilog=examples("fastload jobs cancel imagenet"))
def cancel_job(job: Id, cache: CachePath = None) -> None:
    """End a job. What it warmed and pinned stays; `fastload cache unpin` and `evict` are for that."""
    with _connected(cache) as operator:
        operator.cancel_job(job)


@app.command("retry", epilog=examples("fastload jobs retry imagenet"))
def retry_job(job: Id, cache: CachePath = None) -> None:
    """Run a job again now, whatever came of it before."""
    with _connected(cache) as operator:
        operator.retry_job(job)


def _connected(cache: Path | None) -> Operator:
    """To the daemon; NotServedError where another service serves."""
    from fastload.client.operator import NotServedError, Operator

    operator = Operator.connect(cache_directory(cache), "jobs")
    if not operator.is_daemon:
        operator.close()
        raise NotServedError(
            f"process {operator.service_pid} serves {cache_directory(cache)} while jobs train, and warms nothing by "
            "itself; `fastload daemon` takes over"
        )
    return operator


def _jobs(cache: Path | None) -> list[Job]:
    with _connected(cache) as operator:
        return operator.snapshot().jobs


def _rows(job: Job) -> list[tuple[str, str]]:
    shards = f", {job.shard_count} shards" if job.shard_count else ""  # how many is known at its end
    rows = [
        ("job", job.id),
        ("data set", job.name + (", pinned" if job.is_pinned else "")),
        ("urls", " ".join(job.urls)),
        ("from", "submitted" if job.is_submitted else "configuration"),
        ("since", _moment(job.since)),
        ("state", job.state),
        ("held", f"{format_bytes(job.held_bytes)} of {format_bytes(job.total_bytes)}{shards}"),
        ("fetched", format_bytes(job.fetched_bytes)),
        ("priority", str(job.priority)),
    ]
    if job.bytes_per_s:
        rows.append(("a second", format_bytes(job.bytes_per_s)))
    if job.eta_s >= 0:
        rows.append(("left", duration(job.eta_s)))
    if job.deadline_at:
        rows.append(("deadline", _moment(job.deadline_at)))
    if job.next_at:
        rows.append(("next", _moment(job.next_at)))
    if job.error:
        rows.append(("error", job.error))
    more = job.failed_shards - len(job.failed)
    rows += [("failed", f"{url}: {why}") for url, why in job.failed.items()]
    return rows + ([("failed", f"and {more} more")] if more > 0 else [])


def _moment(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))
