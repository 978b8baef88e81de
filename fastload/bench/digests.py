"""Whether two loaders give the same samples, in whatever order: a digest of each column of an epoch. Pure.

Each element of a column is digested by itself (blake2b, 64 bits) with its dtype and shape, and the digests are added
up modulo 2^64: so the order does not matter, and what comes twice or not at all does. Which label stands beside which
image is not in it. Bytes compare with bytes, text with text, arrays with arrays of the same dtype, values of JSON with
such; Python's numbers count as int64 and float64. Columns are compared by name; one without a name is
compared with all of the other side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fastload.bench.passes import columns_of

_MASK = (1 << 64) - 1


class Column(msgspec.Struct):
    """`kind` is what its elements are: "bytes", "text", a dtype, or the name of a type that is not compared."""

    kind: str = ""
    count: int = 0
    digest: int = 0
    compares: bool = True

    def add(self, element: Any) -> None:
        """One element more."""
        self.count += 1
        kind, shape, data = _plain(element)
        self.kind = kind if self.kind in ("", kind) else "several types"
        if data is None:
            self.compares = False
            return
        digest = hashlib.blake2b(data, digest_size=8, key=f"{kind}{shape}".encode()[:64]).digest()
        self.digest = (self.digest + int.from_bytes(digest, "little")) & _MASK


class Equality(msgspec.Struct):
    """Columns that are equal and that differ, by name, and why others were not compared."""

    equal: list[str] = []
    different: list[str] = []
    unchecked: list[str] = []

    def sentence(self) -> str:
        """What came of it."""
        if self.different:
            return f"It does not give the same samples: {', '.join(self.different)} differ."
        if self.unchecked:
            return f"Whether it gives the same samples was not checked: {'; '.join(self.unchecked)}."
        return f"It gives the same samples as fastload ({', '.join(self.equal)})."


def add_batch(found: dict[str, Column], batch: Any) -> None:
    """Add the samples of a batch to the columns."""
    for name, values in (columns_of(batch) or {"batch": [batch]}).items():
        column = found.setdefault(name, Column())
        for element in values:
            column.add(element)


def merged(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """The columns of all parts of an epoch."""
    found: dict[str, Column] = {}
    for part in parts:
        for name, column in part.items():
            whole = found.setdefault(name, Column(kind=column.kind))
            whole.kind = whole.kind if whole.kind == column.kind else "several types"
            whole.count += column.count
            whole.digest = (whole.digest + column.digest) & _MASK
            whole.compares &= column.compares
    return found


def compared(ours: Mapping[str, Column], theirs: Mapping[str, Column]) -> Equality:
    """Their columns against ours."""
    found = Equality()
    our_count, their_count = (max((each.count for each in side.values()), default=0) for side in (ours, theirs))
    if our_count != their_count:
        found.unchecked.append(f"it gives {their_count:,} samples, fastload {our_count:,}")
        return found
    for name, column in theirs.items():
        if not column.compares:
            found.unchecked.append(f"{name} is of a type that has no bytes ({column.kind})")
        elif name in ours:
            if ours[name].kind != column.kind or not ours[name].compares:
                found.unchecked.append(f"{name} is {column.kind}, and fastload's {ours[name].kind}")
            else:
                (found.equal if ours[name].digest == column.digest else found.different).append(name)
        else:
            same = [each for each, own in ours.items() if own.kind == column.kind and own.digest == column.digest]
            if same:
                found.equal.append(f"{name} ({same[0]})")
            else:
                found.unchecked.append(f"{name} ({column.kind}) is like none of fastload's columns")
    return found


def _plain(element: Any) -> tuple[str, tuple[int, ...], bytes | None]:
    """Kind, shape and bytes; None for what has none."""
    if isinstance(element, bytes | bytearray | memoryview):
        return "bytes", (), bytes(element)
    if isinstance(element, str):
        return "text", (), element.encode("utf-8", "surrogatepass")
    if isinstance(element, bool):
        element = np.bool_(element)
    elif isinstance(element, int | float) and abs(element) < 1 << 63:
        element = np.float64(element) if isinstance(element, float) else np.int64(element)
    if hasattr(element, "detach"):
        try:
            element = element.detach().cpu().numpy()
        except (TypeError, RuntimeError):  # a dtype that numpy lacks, or one of torch's own layouts
            return str(element.dtype), (), None
    if isinstance(element, np.ndarray | np.generic) and element.dtype.kind in "biufcSU":
        return str(element.dtype), tuple(element.shape), element.tobytes()
    if element is None or isinstance(element, dict | list | tuple):  # as columns of JSON have them
        with contextlib.suppress(TypeError, ValueError):  # something else is in it
            return "JSON", (), json.dumps(element, sort_keys=True).encode()
    return type(element).__name__, (), None
