"""Which columns a batch has, and how each is decoded: what the user said, put in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastload.decode import Decoder, raw
from fastload.errors import ConfigError

KEY, URL = "__key__", "__url__"

_RAW = raw()
# Columns that a message names.
_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True)
class ColumnSet:
    """The columns of every sample: `names` in order, or None for all that a shard has, as raw bytes."""

    names: tuple[str, ...] | None
    decoders: Mapping[str, Decoder]
    as_tuple: bool

    @classmethod
    def of(cls, columns: Sequence[str] | None, decode: Mapping[str, Decoder] | None, as_tuple: bool) -> ColumnSet:
        """From the arguments of a data set; raises `ConfigError` where they do not fit together."""
        decoders = _checked_decoders(decode)
        if isinstance(columns, str):
            raise ConfigError(f"columns={columns!r} is one string; give a list of column names")
        wrong = [name for name in columns or () if not isinstance(name, str) or name[:1] in ("", ".")]
        if wrong:
            raise ConfigError(
                f"columns={list(columns or ())!r}: {wrong[0]!r} is not a name such as 'jpg', without a dot"
            )
        names = tuple(columns) if columns is not None else tuple(decoders) or None
        if names is not None and len(set(names)) < len(names):
            raise ConfigError(f"columns={list(names)!r} names a column twice")
        unused = [name for name in decoders if names is not None and name not in names]
        if unused:
            raise ConfigError(
                f"decode names {unused!r}, which columns={list(names or ())!r} leaves out; name it in both"
            )
        if as_tuple and names is None:
            raise ConfigError("as_tuple=True needs columns or decode, which give the order of the tuple")
        return cls(names, decoders, as_tuple)

    def kernel_modules(self) -> tuple[str, ...]:
        """The modules of `fastload.kernels` that the decoders use."""
        return tuple(dict.fromkeys(name for each in self.decoders.values() for name in each.kernel_modules()))

    def wants_keys(self) -> bool:
        """Whether a decoder makes random choices, so that samples need keys."""
        return any(each.wants_keys() for each in self.decoders.values())

    def decoder(self, name: str) -> Decoder:
        """The decoder of a column."""
        return self.decoders.get(name, _RAW)


def shown(names: Sequence[str]) -> str:
    """Names of columns for a message, which may be of any number."""
    more = len(names) - _SHOWN_MAX
    return f"{list(names[:_SHOWN_MAX])}" + (f" and {more} more" if more > 0 else "")


def _checked_decoders(decode: Mapping[str, Decoder] | None) -> dict[str, Decoder]:
    if decode is not None and not isinstance(decode, Mapping):
        raise ConfigError(f"decode={decode!r} is not a dict of column -> decoder")
    decoders = dict(decode or {})
    for name, decoder in decoders.items():
        if not isinstance(decoder, Decoder):
            raise ConfigError(
                f"decode[{name!r}]={decoder!r} is not a decoder; use one of fastload.decode, such as "
                "fastload.decode.image(size=224)"
            )
        if name in (KEY, URL):
            raise ConfigError(f"decode[{name!r}]: {name} is given with every sample and cannot be decoded")
    return decoders
