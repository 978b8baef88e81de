"""Strings of a batch that are made when they are first looked at: its keys and URLs.

Most jobs train without them, and a list of a thousand strings takes longer to make than a small batch to gather.
`Strings` reads as the list would, and makes it at its first use. It is deliberately neither a list nor registered as a
`collections.abc.Sequence`: what copies a list in C would see it empty, and torch, Lightning and accelerate take a
sequence apart, item by item, to move it to a device, while they keep what they do not know whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, overload

__all__ = ["Strings"]


class Strings:
    """A batch's strings: reads as a list of `str`, which `list(strings)` gives. Two with the same strings are equal,
    and so is a list or tuple of them. Pickled, it holds the strings. Thread-safe.
    """

    __slots__ = ("_made", "_make", "_start", "_stop")

    def __init__(self, make: Callable[[], list[str]], start: int, stop: int) -> None:
        """Those from `start` to `stop` of what `make` returns, which may be called more than once."""
        self._make: Callable[[], list[str]] | None = make
        self._start, self._stop = start, stop
        self._made: list[str] | None = None

    @classmethod
    def of(cls, texts: list[str]) -> Strings:
        """These strings."""
        return cls(lambda: texts, 0, len(texts))

    def tolist(self) -> list[str]:
        """A list of its own."""
        return list(self._all())

    def _all(self) -> list[str]:
        # In this order: a thread that is done meanwhile sets `_made` first, and clears `_make` only then.
        make, made = self._make, self._made
        if made is None:
            assert make is not None, "what makes the strings is kept until they are made"
            made = self._made = make()[self._start : self._stop]
            self._make = None  # with it goes what it holds
        return made

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._all()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._all())

    def __contains__(self, item: object) -> bool:
        return item in self._all()

    def index(self, text: str) -> int:
        """Where `text` is first. ValueError where it is not."""
        return self._all().index(text)

    def count(self, text: str) -> int:
        """How many times `text` is there."""
        return self._all().count(text)

    def __add__(self, other: Any) -> list[str]:
        return [*self._all(), *other] if isinstance(other, Strings | list) else NotImplemented

    def __radd__(self, other: Any) -> list[str]:
        return [*other, *self._all()] if isinstance(other, list) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings | list | tuple):
            return NotImplemented
        return len(self) == len(other) and self._all() == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return Strings.of, (self._all(),)
