"""Which columns a batch has, and how each is decoded: the user's arguments in one form.

Shard indexes have the names of columns in lower case, so a name is looked up like that; a batch has it as the user
writes it. A "?" behind a name is no part of it: it says that samples may lack the column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

from fastload.decode import Decoder, raw
from fastload.decode.optional import check_missing
from fastload.errors import ConfigError

KEY, URL = "__key__", "__url__"
# All columns, of which each sample has some.
ANY = "*?"

Decoding: TypeAlias = Callable[[bytes], Any]
"""A function of the user's that makes a value of the bytes of a column."""

_RAW = raw()
# Columns that a message names.
_SHOWN_MAX = 20
# Columns that a name is compared with, which takes some microseconds for each.
_COMPARED_MAX = 1000


@dataclass(frozen=True, slots=True)
class ColumnSet:
    """The columns of every sample: `names` in order, or None for all that a shard has, as raw bytes.

    `members`: the same as shard indexes have them. `optional`: those of `names` that samples may lack. `all_optional`:
    any sample may lack any column (`"*?"`), so that a batch of them has no columns by itself. `functions`: the user's
    own, of the bytes of a column, which are read raw. `allow_pickle`: pickles are read, which may run any code.
    """

    names: tuple[str, ...] | None
    decoders: Mapping[str, Decoder]
    as_tuple: bool
    members: tuple[str, ...] | None = None
    optional: frozenset[str] = frozenset()
    all_optional: bool = False
    functions: Mapping[str, Decoding] = field(default_factory=dict)
    allow_pickle: bool = False

    @classmethod
    def of(
        cls, columns: Sequence[str] | None, decode: Mapping[str, Decoder | Decoding] | None, as_tuple: bool
    ) -> ColumnSet:
        """From the arguments of a data set; raises `ConfigError` where they do not fit together."""
        if isinstance(columns, str):
            raise ConfigError(f"columns={columns!r} is one string; give a list of column names")
        if not isinstance(as_tuple, bool):
            raise ConfigError(
                f"as_tuple={as_tuple!r} must be True, where samples are tuples, or False, where they are dicts"
            )
        decoders, functions = _checked_decoders(decode)
        if columns is not None and ANY in columns and list(columns) != [ANY]:
            raise ConfigError(f"columns={list(columns)!r}: {ANY!r} is all columns, and stands alone")
        if columns is not None and list(columns) == [ANY]:
            if as_tuple or decoders:
                raise ConfigError(
                    f"columns=[{ANY!r}] is for dicts of stored bytes; name the columns for decode and tuples"
                )
            return cls(None, {}, as_tuple, all_optional=True)
        if columns is None and not decoders:
            if as_tuple:
                raise ConfigError("as_tuple=True needs columns or decode, which give the order of the tuple")
            return cls(None, {}, as_tuple)
        decoded = _columns("decode", decoders)
        wanted = decoded if columns is None else _columns("columns", columns)
        unused = [column.text for member, column in decoded.items() if member not in wanted]
        if unused:
            raise ConfigError(
                f"decode names {unused!r}, which columns={list(columns or ())!r} leaves out; name it in both"
            )
        by_name, functions_by_name = {}, {}
        for member, column in decoded.items():
            _check(column, wanted[member], decoders[column.text])
            by_name[wanted[member].name] = decoders[column.text]
            if column.text in functions:
                functions_by_name[wanted[member].name] = functions[column.text]
        names = tuple(column.name for column in wanted.values())
        optional = frozenset(column.name for column in wanted.values() if column.is_optional)
        return cls(names, by_name, as_tuple, tuple(wanted), optional, functions=functions_by_name)

    def may_lack(self, name: str) -> bool:
        """Whether samples may lack a column."""
        return self.all_optional or name in self.optional

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


def meant(name: str, there: Sequence[str]) -> str:
    """A question, where no shard has `name` but a column of nearly that name: marked optional, it would be missing
    everywhere, and nothing would say so.
    """
    close = get_close_matches(name.lower(), there[:_COMPARED_MAX], 1)
    return f" Did you mean {close[0]!r}?" if close and name.lower() not in there else ""


class _Column(NamedTuple):
    """What the user wrote, and the name in it."""

    text: str
    name: str

    @property
    def is_optional(self) -> bool:
        return self.text != self.name


def _columns(argument: str, texts: Iterable[object]) -> dict[str, _Column]:
    """What is written in an argument, by the column that indexes know."""
    texts, columns = list(texts), dict[str, _Column]()
    for text in texts:
        name = text.removesuffix("?") if isinstance(text, str) else ""
        if not isinstance(text, str) or any(part[:1] in ("", ".") for part in name.split(";")):
            raise ConfigError(f"{argument}={texts!r}: {text!r} is not a name such as 'jpg', without a dot")
        if name in (KEY, URL):
            raise ConfigError(
                f"{argument}={texts!r}: {name!r} is no column; leave it out, since every dict has it anyway"
            )
        member = name.lower()
        if member in columns:
            other = columns[member].text
            raise ConfigError(
                f"{argument}={texts!r} names a column twice"
                + ("" if text == other else f": {other!r} and {text!r} are the same, whatever their case and mark")
            )
        columns[member] = _Column(text, name)
    return columns


def _check(decoded: _Column, wanted: _Column, decoder: Decoder) -> None:
    """Raise `ConfigError` where a decoder does not suit a column."""
    if decoded.is_optional and not wanted.is_optional:
        raise ConfigError(
            f"decode[{decoded.text!r}]: columns has {wanted.text!r}, which every sample must have; write "
            f"{wanted.text + '?'!r} there, too, where samples may lack it"
        )
    if wanted.is_optional:
        try:
            check_missing(decoder)
        except ConfigError as error:
            raise ConfigError(
                f"decode[{decoded.text!r}]={decoder!r}: samples may lack {wanted.text!r}, and {error}; give the "
                "decoder a default="
            ) from error
    elif decoder.missing() is not None:
        raise ConfigError(
            f"decode[{decoded.text!r}] has a default, and every sample must have {wanted.text!r}; write "
            f"{wanted.text + '?'!r} where samples may lack it"
        )


# How webdataset and others name decoders.
_CALLED = {
    "image(size=224)": ("pil", "pilrgb", "pilrgb8", "rgb", "rgb8", "torch", "torchrgb", "torchrgb8", "image", "jpeg"),
    "integer()": ("int", "integer", "cls", "long"),
    "number()": ("float", "number"),
    "text()": ("str", "text", "txt", "utf8", "utf-8"),
    "json()": ("json", "dict"),
    "array()": ("array", "ndarray", "npy", "numpy"),
    "raw()": ("raw", "bytes"),
}


def _instead_of(decoder: object) -> str:
    """What to write instead of something that is no decoder."""
    name = decoder.lower() if isinstance(decoder, str) else getattr(decoder, "__name__", str(decoder)).lower()
    if getattr(decoder, "__module__", "").startswith("fastload.decode"):
        return f"call it: fastload.decode.{name}(...)"
    for ours, others in _CALLED.items():
        if name in others:
            return f"write fastload.decode.{ours}"
    return "use one of fastload.decode, such as fastload.decode.image(size=224)"


def _checked_decoders(
    decode: Mapping[str, Decoder | Decoding] | None,
) -> tuple[dict[str, Decoder], dict[str, Decoding]]:
    """The decoders, and the functions of the user's, whose columns are decoded as bytes."""
    if decode is not None and not isinstance(decode, Mapping):
        raise ConfigError(
            f'decode={decode!r} is not a dict of column -> decoder, such as {{"jpg": fastload.decode.image(size=224)}}'
        )
    decoders, functions = dict[str, Decoder](), dict[str, Decoding]()
    for name, decoder in (decode or {}).items():
        if name in (KEY, URL):
            raise ConfigError(f"decode[{name!r}]: {name} is given with every sample and cannot be decoded")
        if isinstance(decoder, Decoder):
            decoders[name] = decoder
        elif callable(decoder) and not str(getattr(decoder, "__module__", "")).startswith("fastload."):
            decoders[name], functions[name] = _RAW, decoder
        else:
            raise ConfigError(f"decode[{name!r}]={decoder!r} is not a decoder; {_instead_of(decoder)}")
    return decoders, functions
