"""Attributes that are computed when they are first read, without a lock.

`functools.cached_property` of Python 3.11 holds one lock for all objects of a class while it computes. Threads that
make batches wait for each other there, and a process that is forked meanwhile waits forever. Here two threads that read
at once may both compute, and one of the values stays; the result must be the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class cached_attribute(Generic[T]):  # noqa: N801  # it is used like `property`
    """A method that becomes an attribute of the object, once it was called."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute, self._name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> cached_attribute[T]: ...
    @overload
    def __get__(self, owner: object, kind: type) -> T: ...
    def __get__(self, owner: object | None, kind: type) -> cached_attribute[T] | T:
        if owner is None:
            return self
        return vars(owner).setdefault(self._name, self._compute(owner))  # type: ignore[no-any-return]
