"""The result of a benchmark: phases, each of figures with the value of every run. Written as JSON.

`VERSION` grows when a field is renamed, removed or changes its meaning; a reader refuses a newer one. Byte counts and
rates are in bytes, times in seconds. No credentials; endpoints and hosts only where the user asked for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from fastload.errors import ConfigError

VERSION = 1

Better = Literal["more", "less", ""]


class Figure(msgspec.Struct, kw_only=True):
    """One quantity, with the value of each run. `better` says which way is better, "" where neither is.

    One that is `steady` does not depend on what else the machine does: CPU-seconds, bytes, requests, memory.
    """

    name: str
    unit: str
    values: list[float]
    better: Better = ""
    steady: bool = False


class Series(msgspec.Struct, kw_only=True):
    """A curve: `ys` over `xs`."""

    name: str
    x_unit: str
    y_unit: str
    xs: list[float]
    ys: list[float]


class Phase(msgspec.Struct, kw_only=True):
    """A part of the benchmark: what it found, or why it found nothing."""

    name: str
    seconds: float
    figures: list[Figure] = []
    series: list[Series] = []
    notes: list[str] = []
    error: str = ""

    def value(self, name: str) -> float | None:
        """The median of a figure, None where it is not there."""
        for figure in self.figures:
            if figure.name == name and figure.values:
                ordered = sorted(figure.values)
                middle = len(ordered) // 2
                return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return None


class Machine(msgspec.Struct, kw_only=True):
    """Where it ran, and what else ran there."""

    cpu: str
    cores: float  # that this process may use, control groups included
    memory_bytes: int
    kernel: str
    file_system: str  # of the cache
    load_before: float
    load_after: float = 0.0


class Work(msgspec.Struct, kw_only=True):
    """What was read, and how: two results compare where `digest` is the same."""

    urls: list[str]
    shards: int
    samples: int
    byte_count: int
    options: dict[str, str]
    digest: str


class Result(msgspec.Struct, kw_only=True):
    """All of a benchmark."""

    version: int
    taken_at: str  # UTC, ISO 8601
    command: list[str]
    versions: dict[str, str]
    machine: Machine
    work: Work
    phases: list[Phase]
    verdict: list[str] = []
    interrupted: bool = False

    def phase(self, name: str) -> Phase | None:
        """A phase by its name, None where it was left out or failed."""
        return next((each for each in self.phases if each.name == name and not each.error), None)


def write(result: Result, path: Path) -> None:
    """Write it as JSON; ConfigError where that cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror or error}; name a file in a folder that is there") from error


class _Head(msgspec.Struct):
    version: int


def read(path: Path) -> Result:
    """The result in a file; ConfigError where it is none, damaged, or of a newer version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; name a file that `fastload bench --json` wrote"
        ) from error
    try:
        version = msgspec.json.decode(data, type=_Head).version
        if version > VERSION:
            raise ConfigError(
                f"{path} is of version {version} of the format, and this fastload reads {VERSION}; update it"
            )
        return msgspec.json.decode(data, type=Result)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no result of `fastload bench`, or damaged: {error}") from error
