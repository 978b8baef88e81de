"""What went wrong with the cache, a sentence each, once each: for all consumers, those to come as well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_COUNT_MAX = 16


class Troubles:
    """Used by the loop's thread only, except for `add_from_thread`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.messages: list[str] = []
        self.tell: Callable[[str], None] = lambda message: None  # whom to tell of a new one
        self._loop = loop
        self._closed = False

    def add_from_thread(self, message: str) -> None:
        """`add`, from any thread, and heard of later."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self.add, message)

    def add(self, message: str) -> None:
        """Note it, and tell."""
        if message in self.messages or len(self.messages) >= _COUNT_MAX or self._closed:
            return
        self.messages.append(message)
        self.tell(message)

    def close(self) -> None:
        """Nobody is told anything more."""
        self._closed = True
