"""What `fastload warm` is to warm: its options become `Task`s, which are warmed one after the other, or tables of jobs,
which are handed over to the daemon.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastload.config import format_bytes, parse_rate, parse_seconds
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.daemon.config import DataTable
    from fastload.prepare import EarlierRun, PinTerms, WarmJob
    from fastload.protocol import Progress, WarmTerms

ORDERS = ("window", "shards", "global", "none")
_LIST_BYTES_MAX = 256 << 20


@dataclass(slots=True)
class Task:
    """One thing to warm: a job's data, or else what an earlier run read; and the last progress that came."""

    name: str
    job: WarmJob | None
    run: EarlierRun | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)
    terms: WarmTerms | None = None
    pin: PinTerms | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Options that hold for all that is warmed, as they were written."""

    profile: str | None
    bandwidth: str | None
    deadline: str | None
    pin: bool
    ttl: str | None

    @property
    def storage_options(self) -> dict[str, Any]:
        return {} if self.profile is None else {"profile": self.profile}

    def terms(self, table: DataTable | None = None) -> WarmTerms:
        """How fast and how soon; what no option says is the table's."""
        from fastload.protocol import WarmTerms

        bytes_per_s = table.bytes_per_s if table is not None else 0
        if self.bandwidth is not None:
            bytes_per_s = parse_rate(self.bandwidth, "--bandwidth")
            if not bytes_per_s:
                raise ConfigError(f"--bandwidth={self.bandwidth} lets nothing through; leave it out for no limit")
        deadline = deadline_of(self.deadline, time.time()) if self.deadline is not None else 0.0
        if not deadline and table is not None and table.deadline_s is not None:
            deadline = time.time() + table.deadline_s
        return WarmTerms(bytes_per_s, table.priority if table is not None else 0, deadline, goes_on=True)

    @property
    def ttl_s(self) -> float:
        seconds = 0.0 if self.ttl is None else parse_seconds(self.ttl, "--ttl")
        if self.ttl is not None and not seconds:
            raise ConfigError(f"--ttl={self.ttl} would end the pin at once; leave it out for no end")
        return seconds


def deadline_of(text: str, now: float) -> float:
    """`2h`, which counts from now, or a time such as `2027-01-31T08:00`, here where nothing else is said: as seconds
    since 1970.
    """
    try:
        at = datetime.fromisoformat(text).timestamp() if "-" in text[1:] else now + parse_seconds(text, "--deadline")
    except (ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--deadline={text} is no time; write 2h, or 2027-01-31T08:00") from None
    if at <= now:
        raise ConfigError(f"--deadline={text} has passed; give a time to come, or a length of time such as 2h")
    return at


def read_list(name: str) -> list[str]:
    """The URLs of a file, one a line; blank lines and those that begin with `#` are none. `-` is standard input."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LIST_BYTES_MAX + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(_LIST_BYTES_MAX + 1)
        lines = [line.strip() for line in data.decode().splitlines()]
    except OSError as error:
        raise ConfigError(f"--list={name}: it cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--list={name}: it is no text in UTF-8; write one URL a line") from None
    if len(data) > _LIST_BYTES_MAX:
        raise ConfigError(f"--list={name} is longer than {format_bytes(_LIST_BYTES_MAX)}; name prefixes instead")
    urls = [line for line in lines if line and not line.startswith("#")]
    if not urls:
        raise ConfigError(f"--list={name} names no URL; write one a line")
    return urls


def checked_shuffle(shuffle: str) -> str:
    if shuffle not in ORDERS:
        raise ConfigError(f"--shuffle={shuffle} must be {', '.join(ORDERS[:-1])} or {ORDERS[-1]}")
    return shuffle


def task_of_urls(urls: list[str], order: Mapping[str, Any], asked: Asked) -> Task:
    from fastload.arguments import checked_urls
    from fastload.formats import checked_format
    from fastload.plan import Ranks
    from fastload.prepare import PinTerms, WarmJob
    from fastload.store.listing import expand
    from fastload.warmup import pin_name, requested_order

    for url in checked_urls(urls):
        expand(url)
    node, nodes = order["node"], order["nodes"]
    if node >= nodes:
        raise ConfigError(f"--node={node} must be from 0 to {nodes - 1}, since --nodes={nodes}")
    job = WarmJob(
        urls,
        requested_order(order["shuffle"], order["seed"], order["shuffle_window"], order["partitions"]),
        order["epoch"],
        Ranks(node, nodes, 0, 1),
        order["index"],
        order["manifest"],
        checked_format(order["format"]),
        order["split"],
    )
    pin = PinTerms(pin_name(job.names), asked.ttl_s) if asked.pin else None
    return Task("", job, None, asked.storage_options, asked.terms(), pin)


def tables_of(file: Path, order: Mapping[str, Any]) -> list[DataTable]:
    """Those of the file, whose jobs read in the `order` that was given besides."""
    from msgspec.structs import replace as changed

    from fastload.daemon.config import read_tables

    tables = [changed(table, job=changed(table.job, **order)) for table in read_tables(file, os.environ)]
    for table in tables:
        table.check()
    return tables


def task_of_table(table: DataTable, asked: Asked) -> Task:
    from fastload.daemon.config import storage_options_of
    from fastload.prepare import PinTerms

    pin = None
    if table.pin or asked.pin:
        pin = PinTerms(table.name, asked.ttl_s or table.ttl_s or 0.0, table.quota_bytes or 0)
    options = asked.storage_options or storage_options_of(table.credentials)
    return Task(table.name, table.job.warm_job(table.urls), None, options, asked.terms(table), pin)


# Handed over


def hand_over(directory: Path, urls: list[str], file: Path | None, order: Mapping[str, Any], asked: Asked) -> list[str]:
    """Submit it to the daemon; the id of each job."""
    import msgspec

    from fastload.daemon.submission import submit
    from fastload.formats.splits import with_split

    tables = [msgspec.to_builtins(table) for table in tables_of(file, order)] if file is not None else []
    if urls:
        from fastload.store import normalise
        from fastload.warmup import pin_name

        job = {name: value for name, value in order.items() if value is not None}
        name = pin_name(with_split(urls, order.get("split")))
        tables = [{"name": name, "urls": [normalise(url) for url in urls], "job": job, "when": "once"}]
    if not tables:
        raise ConfigError("--daemon takes URLs, --list or --job; what a run read is warmed by this command itself")
    given = {
        "credentials": None if asked.profile is None else f"profile:{asked.profile}",
        "bandwidth": asked.bandwidth,
        "deadline": None if asked.deadline is None else deadline_of(asked.deadline, time.time()) - time.time(),
        "pin": asked.pin or None,
        "ttl": asked.ttl,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return [submit(directory, _without_variables({**table, **given})) for table in tables]


def _without_variables(value: Any) -> Any:
    """What was written as it is to be: a dollar sign begins no variable."""
    match value:
        case dict():
            return {name: _without_variables(each) for name, each in value.items()}
        case list():
            return [_without_variables(each) for each in value]
        case str():
            return value.replace("$", "$$")
        case _:
            return value


def task_of_run(directory: Path, named: str, how: str, asked: Asked) -> Task:
    """What the run read that is called so. Of large files it is not kept whether they were read in pieces: those that
    data sets of the format `how` read so were, unless all that was read are files, by `fastload.open`.
    """
    from fastload.formats import checked_format
    from fastload.history.archive import Archive
    from fastload.history.library import OPENING
    from fastload.prepare import EarlierRun

    archive = Archive(directory)
    run = archive.read(archive.find(named))
    urls = [url for rows in run.objects.rows() for url, *_ in rows]
    are_files = set(run.summary.traces) == {OPENING}
    earlier = EarlierRun(urls, None if are_files else checked_format(how))
    return Task(run.name, None, earlier, asked.storage_options, asked.terms())
