"""Data sets as Megatron-Energon prepares them: shards, and beside them a folder `.nv-meta` with files about these.

    data/.nv-meta/split.yaml    split_parts: {train: [shards/{000..007}.tar], val: [...]}
                                exclude: [shards/003.tar, shards/005.tar/000032]
    data/.nv-meta/.info.json    {"shard_counts": {"shards/000.tar": 1223, ...}}

A part of `split_parts` is a list of shards, named from the data set's folder on, maybe by patterns; samples come in
this order. `exclude` names whole shards, and single samples as the shard's name, a slash and the sample's key. How many
samples a shard holds, with those that are excluded, is in `shard_counts`. Both files may be JSON or YAML.

Nothing in these files is believed: a name is one of a shard that was listed, or an error.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from braceexpand import braceexpand

from fastload.errors import ConfigError

FOLDER = ".nv-meta/"
SPLIT_FILES = ("split.yaml", "split.json")
COUNT_FILES = (".info.json", ".info.yaml")
# YAML is read into memory many times its size.
_BYTES_MAX = 256 << 20
# Of patterns, which may stand for any number of names.
_NAMES_MAX = 10_000_000
_DIGITS_MAX, _DEPTH_MAX = 18, 32
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True, slots=True)
class Splits:
    """What a split file says: by split the patterns of its shards; and what is excluded, as it stands there."""

    url: str
    parts: Mapping[str, list[Any]]
    excluded: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, data: bytes, url: str) -> Splits:
        """Those of the file at `url`; ConfigError where it is none."""
        read = _read(data, url)
        parts = read.get("split_parts")
        excluded = read.get("exclude") or []
        if not isinstance(parts, Mapping) or not parts or not all(isinstance(each, list) for each in parts.values()):
            raise ConfigError(f"{url} has no split_parts that are lists of shards; write it again")
        if not isinstance(excluded, list):
            raise ConfigError(f"{url}: exclude is no list; write it again")
        return cls(url, {str(name): list(each) for name, each in parts.items()}, excluded)

    def shards(self, split: str) -> list[str]:
        """The names of a split's shards but for those that are excluded, in order."""
        excluded = set(_expanded(self.excluded, self.url))
        return [name for name in _expanded(self.parts[split], self.url) if name not in excluded]

    def samples(self, shards: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """By shard, of those called `shards`: the keys of samples that are excluded."""
        names = set(shards)
        found: dict[str, dict[str, None]] = {}
        for text in _expanded(self.excluded, self.url):
            at = text.find("/")
            while at >= 0:
                if text[:at] in names:
                    found.setdefault(text[:at], {})[text[at + 1 :]] = None
                at = text.find("/", at + 1)
        return {name: tuple(keys) for name, keys in found.items()}


def counts(data: bytes, url: str) -> dict[str, int]:
    """How many samples shards hold, by name, as the file at `url` says; ConfigError where it is none."""
    found = _read(data, url).get("shard_counts")
    if not isinstance(found, Mapping):
        raise ConfigError(f"{url} has no shard_counts; write it again, or remove it")
    return {str(name): _count(value, f"{url}: {name}") for name, value in found.items()}


def _count(value: object, where: str) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(f"{where} has {text[:40]!r} samples, which is no number; write it again")
    return int(text)


def _expanded(patterns: Iterable[object], url: str) -> Iterator[str]:
    """The names that patterns stand for."""
    left = _NAMES_MAX
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{url} names {pattern!r:.80}, which is no text; write it again")
        left -= _at_most(pattern)
        if left < 0:
            raise ConfigError(f"{url} names more than {_NAMES_MAX} shards; correct {pattern!r:.80}")
        try:
            yield from (name.removeprefix("./") for name in braceexpand(pattern))
        except ValueError as error:
            raise ConfigError(f"{url}: the braces of {pattern!r:.80} do not match; write {{000..123}}") from error


def _at_most(pattern: str) -> int:
    """How many names a pattern may stand for, or more, which are all made before the first comes: in each pair of
    braces as many as it has parts, times those that the braces within it stand for, and all ranges.
    """
    count, depth, parts = 1, 0, [1]
    for character in pattern if "{" in pattern else "":
        if character == "{":
            depth += 1
            parts.append(1)
            if depth > _DEPTH_MAX:
                return _NAMES_MAX + 1
        elif character == "," and depth:
            parts[-1] += 1
        elif character == "}" and depth:
            depth -= 1
            count *= parts.pop()
    for match in _RANGE.finditer(pattern):
        is_huge = max(map(len, match.groups())) > _DIGITS_MAX
        count *= _NAMES_MAX + 1 if is_huge else abs(int(match[2]) - int(match[1])) + 1
    return count


def _read(data: bytes, url: str) -> dict[str, Any]:
    if len(data) > _BYTES_MAX:
        raise ConfigError(f"{url} has {len(data)} bytes, above {_BYTES_MAX}; name the shards instead")
    try:
        found = msgspec.json.decode(data) if url.endswith(".json") else _read_yaml(data, url)
    # The latter two where names are not UTF-8, and where brackets are a thousand deep.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{url} cannot be read: {error}; write it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{url} is no table of names; write it again")
    return found


def _read_yaml(data: bytes, url: str) -> Any:
    """All scalars as texts: a split that is called `no` is no boolean."""
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise ConfigError(
            f"{url} is YAML, which needs PyYAML: pip install 'fastload[energon]', or write it as JSON"
        ) from None
    try:
        return yaml.load(data, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{url} is no YAML: {reason}; write it again") from error
