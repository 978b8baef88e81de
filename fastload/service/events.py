"""How the parts of a core notify those above them, and the core its consumers: events and warnings.

A part calls an event in the loop's thread, and knows none of its handlers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, ParamSpec

from fastload.service.state import Chunk

_Args = ParamSpec("_Args")


class Event(Generic[_Args]):
    """Something that happens: calling it calls all handlers, in the order in which they were connected."""

    __slots__ = ("_handlers",)

    def __init__(self) -> None:
        self._handlers: list[Callable[_Args, object]] = []

    def connect(self, handler: Callable[_Args, object]) -> None:
        """Call this one too."""
        self._handlers.append(handler)

    def __call__(self, *args: _Args.args, **kwargs: _Args.kwargs) -> None:
        for handler in self._handlers:
            handler(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Events:
    """All events of a core."""

    changed: Event[[]] = field(default_factory=Event)
    """There may be something to do: a tick is due."""
    fetched: Event[[Chunk]] = field(default_factory=Event)
    """A chunk has come from its store."""
    load_failed: Event[[Chunk, BaseException]] = field(default_factory=Event)
    """A chunk could not be had."""
    written: Event[[Chunk, bool]] = field(default_factory=Event)
    """A chunk's write was settled: whether it is on disk."""
    disk_stalled: Event[[]] = field(default_factory=Event)
    """The disk does not answer; what was under way was given up."""
    cache_cleared: Event[[]] = field(default_factory=Event)
    """What was kept of data and its versions is to be forgotten."""
    history_cleared: Event[[]] = field(default_factory=Event)
    """What earlier runs have read is to be forgotten."""


_WARNINGS_MAX = 16


class Warnings:
    """What went wrong with the cache, in a sentence each, once each, for present and future consumers.

    Used by the loop's thread only, except for `add_from_thread`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.messages: list[str] = []
        self.added: Event[[str]] = Event()
        self._loop = loop
        self._closed = False

    def add_from_thread(self, message: str) -> None:
        """`add`, from any thread, and later."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self.add, message)

    def add(self, message: str) -> None:
        """Keep a new one, and notify."""
        if message in self.messages or len(self.messages) >= _WARNINGS_MAX or self._closed:
            return
        self.messages.append(message)
        self.added(message)

    def close(self) -> None:
        """Ignore further warnings."""
        self._closed = True
