"""What a daemon is to do: its TOML file as frozen values, or one sentence that says what is wrong with it and where.

    cache = "/nvme/fastload"
    [[data]]
    name = "imagenet"
    urls = ["s3://bucket/imagenet/train-{000000..001023}.tar"]

docs/operations.md lists all keys. A `[[data]]` table is also what is submitted to a daemon that runs, so it is checked
by itself (`data_table`). All of a file is taken or nothing: a daemon that reads it again goes on with what it has where
anything is wrong. Variables (`$NAME`, `${NAME}`) are put in where the text was read; `$$` is a dollar sign. No secret
belongs in here: `credentials` says where they are.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fastload.arguments import checked_split, checked_urls
from fastload.config import parse_bytes, parse_rate, parse_seconds
from fastload.daemon.schedule import Timetable, Windows, parse_bandwidth, parse_when
from fastload.errors import ConfigError, FastloadError
from fastload.formats import Format, checked_format
from fastload.redaction import redact
from fastload.store import normalise
from fastload.store.listing import expand

if TYPE_CHECKING:
    from fastload.prepare import WarmJob

_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_NAME_MAX = 200
_FILE_BYTES_MAX = 4 << 20
_WATCH_LEAST_S = 1.0
# What a message to the service can hold, either way.
_PRIORITY_MAX = 1 << 31


class Table(msgspec.Struct, frozen=True):
    """The base of all tables."""


class OrderTable(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`job`: the arguments by which the job that will read orders its data."""

    seed: int = 0
    shuffle: Literal["window", "shards", "global", "none"] = "window"
    shuffle_window: int | str = "auto"
    epoch: int = 0
    node: int = 0
    nodes: int = 1
    partitions: int | None = None
    index: str | None = None
    manifest: str | None = None
    format: str = "auto"
    split: str | None = None

    @property
    def window_bytes(self) -> int | None:
        """The shuffle window; None: as the job chooses."""
        return None if self.shuffle_window == "auto" else parse_bytes(self.shuffle_window, "shuffle_window")

    def warm_job(self, urls: Sequence[str]) -> WarmJob:
        """What is to be warmed for a job that reads these."""
        from fastload.plan import Ranks, RequestedOrder
        from fastload.prepare import WarmJob

        return WarmJob(
            urls,
            RequestedOrder(self.seed, self.shuffle, self.window_bytes, self.partitions),
            self.epoch,
            Ranks(self.node, self.nodes, 0, 1),
            self.index,
            self.manifest,
            self.shard_format,
            self.split,
        )

    @property
    def shard_format(self) -> Format:
        """The format, which may be a text that stands for one with arguments."""
        return checked_format(self.format)

    def check(self) -> None:
        """ConfigError for what cannot be."""
        _ = self.shard_format
        checked_split(self.split)
        if self.window_bytes == 0:
            raise ConfigError(f'shuffle_window={self.shuffle_window!r} must be at least 1 byte, or "auto"')
        if not 0 <= self.node < self.nodes:
            raise ConfigError(f"node={self.node} must be from 0 to nodes-1, and nodes={self.nodes}")
        if self.epoch < 0:
            raise ConfigError(f"epoch={self.epoch} must be at least 0")
        if self.partitions is not None and self.partitions < 1:
            raise ConfigError(f"partitions={self.partitions} must be at least 1; leave it out for the job's default")


class DataTable(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[data]]`: what to warm, and how it is kept."""

    name: str
    urls: list[str]
    job: OrderTable = OrderTable()
    credentials: str = "env"
    when: str = "always"
    watch: float | str | None = None
    deadline: float | str | None = None
    priority: int = 0
    bandwidth: int | str | None = None
    pin: bool = False
    ttl: float | str | None = None
    quota: int | str | None = None
    verify: float | str | None = None

    @property
    def windows(self) -> Windows:
        """When it may run."""
        return parse_when(self.when)

    @property
    def is_once(self) -> bool:
        """Whether it is over for good once it is done."""
        return self.when == "once"

    @property
    def watch_s(self) -> float | None:
        """How often the store is listed; None: not again."""
        return None if self.watch is None else parse_seconds(self.watch, "watch")

    @property
    def deadline_s(self) -> float | None:
        """How long after it became due it should be done; None: at any time."""
        return None if self.deadline is None else parse_seconds(self.deadline, "deadline")

    @property
    def bytes_per_s(self) -> int:
        """What this job alone may fetch; 0: no limit."""
        return 0 if self.bandwidth is None else parse_rate(self.bandwidth, "bandwidth")

    @property
    def ttl_s(self) -> float | None:
        """How long its pin lasts after its last use; None: until it is taken away."""
        return None if self.ttl is None else parse_seconds(self.ttl, "ttl")

    @property
    def quota_bytes(self) -> int | None:
        """What its pin may hold at most; None: as much as there is."""
        return None if self.quota is None else parse_bytes(self.quota, "quota")

    @property
    def verify_s(self) -> float | None:
        """In which time all that it holds is read once and checked; None: only when it is used."""
        return None if self.verify is None else parse_seconds(self.verify, "verify")

    def check(self) -> None:
        """ConfigError for what cannot be."""
        if not self.name or len(self.name) > _NAME_MAX or not self.name.isprintable():
            raise ConfigError(f"name={self.name[:_NAME_MAX]!r} must be 1 to {_NAME_MAX} printable characters")
        if not self.urls:
            raise ConfigError("urls is empty; name at least one shard, pattern or prefix")
        for url in checked_urls(self.urls):
            expand(url)
            if url.startswith("~"):
                raise ConfigError(f"the URL {url} names a home directory; write the whole path, such as $HOME/data/")
            if redact(url) != url:
                raise ConfigError(f"the URL {url} holds a secret; put it into the file that credentials names")
        with _at("job"):
            self.job.check()
        _check_credentials(self.credentials)
        _ = self.windows, self.deadline_s, self.bytes_per_s, self.ttl_s, self.quota_bytes, self.verify_s
        limits = {"bandwidth": self.bytes_per_s, "ttl": self.ttl_s, "quota": self.quota_bytes}
        for name, value in limits.items():  # to the service, 0 is that there is none
            if value == 0 and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be more than 0; leave it out for no limit")
        if abs(self.priority) > _PRIORITY_MAX:
            raise ConfigError(f"priority={self.priority} must be from -2^31 to 2^31")
        if self.watch_s is not None and self.watch_s < _WATCH_LEAST_S:
            raise ConfigError(f'watch={self.watch!r} must be at least "1s"; each look lists the store')
        if self.watch is not None and self.is_once:
            raise ConfigError('when="once" and watch exclude each other; leave one of them out')
        if not self.pin and (self.ttl is not None or self.quota is not None):
            raise ConfigError("ttl and quota are those of a pin; add pin = true, or leave them out")


class WarmTable(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[warm]`: for all jobs together."""

    bandwidth: int | str = "off"
    requests_in_flight: int = 0

    @property
    def timetable(self) -> Timetable:
        """Bytes a second by the minute of the week."""
        return parse_bandwidth(self.bandwidth)

    def check(self) -> None:
        """ConfigError for what cannot be."""
        _ = self.timetable
        if self.requests_in_flight < 0:
            raise ConfigError(f"requests_in_flight={self.requests_in_flight} must be at least 1, or 0 for no limit")


class PageTable(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[page]`: where the page listens, and by which other names browsers call it; see docs/operations.md."""

    listen: str = "127.0.0.1:0"
    hosts: list[str] = []


class MetricsTable(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: where they are to be had; see `fastload.metrics.serve`."""

    listen: str = "127.0.0.1:9432"
    textfile: str | None = None
    textfile_every: float | str = "15s"

    @property
    def listen_at(self) -> str | None:
        """Where to listen; None: nowhere."""
        return None if self.listen == "off" else self.listen

    @property
    def textfile_every_s(self) -> float:
        """How often the file is replaced."""
        return parse_seconds(self.textfile_every, "textfile_every")

    def check(self) -> None:
        """ConfigError for what cannot be."""
        _ = self.textfile_every_s
        if self.listen_at is None and self.textfile is None:
            raise ConfigError('listen="off" and no textfile: name where metrics are to be had, or leave out [metrics]')


class Config(Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    cache: str | None = None
    ram_bytes: int | str | None = None
    disk_bytes: int | str | None = None
    rest_after: float | str | None = None
    warm: WarmTable = WarmTable()
    data: list[DataTable] = []
    page: PageTable | None = None
    metrics: MetricsTable | None = None

    @property
    def limits(self) -> dict[str, int]:
        """The limits of the directory that it names, in bytes."""
        given = {"ram_bytes": self.ram_bytes, "disk_bytes": self.disk_bytes}
        return {name: parse_bytes(value, name) for name, value in given.items() if value is not None}

    @property
    def verify_s(self) -> float:
        """In which time all that is on disk is read once and checked, as the data set that wants it most often says; 0:
        that is not done.
        """
        return min((table.verify_s for table in self.data if table.verify_s), default=0.0)

    @property
    def rest_after_s(self) -> float | None:
        """How long after the last consumer memory is given back; None: as every service does."""
        return None if self.rest_after is None else parse_seconds(self.rest_after, "rest_after")

    def check(self) -> None:
        """ConfigError for what cannot be."""
        _ = self.limits, self.rest_after_s
        with _at("[warm]"):
            self.warm.check()
        if self.metrics is not None:
            with _at("[metrics]"):
                self.metrics.check()
        names = [table.name for table in self.data]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f'two [[data]] tables are called "{twice}"; give each a name of its own')
        for number, table in enumerate(self.data, 1):
            with _at(f'[[data]] {number} "{table.name}"'):
                table.check()
        _check_overlaps(self.data)


def read_config(path: Path, environ: Mapping[str, str]) -> Config:
    """The file at `path`, checked; ConfigError that names the file, the place and the cure."""
    with _at(str(path)):
        config = _converted(_read_toml(path), Config, environ)
        config.check()
        return msgspec.structs.replace(config, data=[absolute(table) for table in config.data])


def absolute(table: DataTable) -> DataTable:
    """The same with relative paths of files made absolute, for a job's process, which runs elsewhere."""

    def at(path: str) -> str:
        return path if path.startswith("/") or "://" in path else normalise(path)

    files = {name: at(path) for name in ("index", "manifest") if (path := getattr(table.job, name))}
    job = msgspec.structs.replace(table.job, **files)
    return msgspec.structs.replace(table, urls=[at(url) for url in table.urls], job=job)


def data_table(values: Mapping[str, Any], environ: Mapping[str, str] | None) -> DataTable:
    """One `[[data]]` table, checked; ConfigError. `environ` None: variables are in it no more."""
    table = _converted(dict(values), DataTable, environ)
    table.check()
    return table


def read_tables(path: Path, environ: Mapping[str, str]) -> list[DataTable]:
    """The `[[data]]` tables of a daemon's file, or the one table that the file is; all checked. ConfigError that names
    the file, the place and the cure. Tables without a name are called as the file.
    """
    with _at(str(path)):
        values = _read_toml(path)
        if "data" not in values:
            return [data_table({"name": path.stem, **values}, environ)]
        if isinstance(values["data"], list):
            values["data"] = [
                {"name": f"{path.stem} {number}", **each} if isinstance(each, dict) else each
                for number, each in enumerate(values["data"], 1)
            ]
        config = _converted(values, Config, environ)
        config.check()
        if not config.data:
            raise ConfigError("it has no [[data]] table; name what to warm in one")
        return config.data


def storage_options_of(credentials: str) -> dict[str, Any]:
    """What `credentials` stands for, as the `storage_options` of a data set; ConfigError where a file cannot be used.

    A file holds such a mapping, as TOML.
    """
    kind, _, where = credentials.partition(":")
    if kind == "profile":
        return {"profile": where}
    return {} if kind == "env" else _read_credentials(Path(where))


def _read_credentials(path: Path) -> dict[str, Any]:
    with _at(f'credentials="file:{path}"'):
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid():
                    raise ConfigError(
                        f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}; use your own"
                    )
                if stat.S_IMODE(status.st_mode) & 0o077:
                    raise ConfigError(
                        f"others may read it (mode {stat.S_IMODE(status.st_mode):04o}); run chmod 600 {path}, and "
                        "think of changing what is in it"
                    )
                return tomllib.loads(file.read(_FILE_BYTES_MAX).decode())
        except OSError as error:
            raise ConfigError(f"it cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            # What is wrong is not quoted: it may be the secret.
            raise ConfigError('it is no TOML; write lines such as access_key_id = "..."') from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.loads(file.read(_FILE_BYTES_MAX).decode())
    except OSError as error:
        raise ConfigError(f"it cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"it is no TOML: {error}") from None


_AnyTable = typing.TypeVar("_AnyTable", bound=Table)


def _converted(values: dict[str, Any], kind: type[_AnyTable], environ: Mapping[str, str] | None) -> _AnyTable:
    _check_keys(values, kind, "")
    if environ is not None:
        values = _expanded(values, environ, "")
    try:
        # Not strict: what a variable stands for is a text, and may be meant as a number.
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise ConfigError(f"{place.rstrip('`').lstrip('.') or 'it'}: {message[:1].lower()}{message[1:]}") from None


def _expanded(value: Any, environ: Mapping[str, str], place: str) -> Any:
    """The value with what its variables stand for."""
    if isinstance(value, dict):
        return {key: _expanded(each, environ, f"{place}.{key}".lstrip(".")) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, environ, f"{place}[{number}]") for number, each in enumerate(value)]
    if not isinstance(value, str):
        return value

    def meaning(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return "$"
        if name not in environ:
            raise ConfigError(
                f"{place}={value!r}: the environment has no variable {name}; set it, or write $$ for a dollar sign"
            )
        return environ[name]

    return _VARIABLE.sub(meaning, value)


def _check_keys(values: Any, kind: Any, place: str) -> None:
    """ConfigError that names the nearest key, for one that is unknown; values of other types are for msgspec."""
    table = _table_in(kind)
    if table is None:
        return
    if isinstance(values, list):
        for number, each in enumerate(values):
            _check_keys(each, table, f"{place}[{number}]")
        return
    if not isinstance(values, dict):
        return
    known = {field.encode_name: field.type for field in msgspec.structs.fields(table)}
    for key, value in values.items():
        at = f"{place}.{key}".lstrip(".")
        if key not in known:
            close = get_close_matches(key, known, 1, 0.5)
            cure = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{at} is no key; {cure}")
        _check_keys(value, known[key], at)


def _table_in(kind: Any) -> type[Table] | None:
    """The table that a field holds, itself or in a list."""
    if isinstance(kind, type) and issubclass(kind, Table):
        return kind
    if typing.get_origin(kind) in (list, typing.Union, types.UnionType):
        return next((found for found in map(_table_in, typing.get_args(kind)) if found is not None), None)
    return None


def _check_credentials(credentials: str) -> None:
    kind, colon, where = credentials.partition(":")
    if credentials != "env" and not (kind in ("profile", "file") and colon and where):
        # Not quoted: it may be the secret itself.
        raise ConfigError('credentials must be "env", "profile:NAME" or "file:PATH", and never a secret itself')
    if kind == "file" and not where.startswith("/"):
        raise ConfigError(f'credentials="file:{where}" must be an absolute path, such as "file:$HOME/secrets.toml"')


def _check_overlaps(tables: Sequence[DataTable]) -> None:
    """ConfigError where two data sets have a shard in common: their orders and quotas would contradict each other."""
    of_url: dict[str, str] = {}
    for table in tables:
        for url in {name for pattern in table.urls for name in expand(pattern)}:
            other = of_url.setdefault(url, table.name)
            if other != table.name:
                raise ConfigError(_overlap(other, table.name, url))
    for prefix, name in [(url, name) for url, name in of_url.items() if url.endswith("/")]:
        for url, other in of_url.items():
            if other != name and url.startswith(prefix):
                raise ConfigError(_overlap(name, other, url))


def _overlap(first: str, second: str, url: str) -> str:
    return f'the data sets "{first}" and "{second}" overlap: both hold {url}; leave it out of one of them'


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Errors within the block begin with the place."""
    try:
        yield
    except FastloadError as error:
        raise ConfigError(f"{place}: {error}") from None
