"""A trainer's connection for one save: it hands an image over, and hears how far that is.

A consumer that reads nothing. So the service is found or started as for any other, lives as long as this does, and is
asked anew, with the image, where it has ended before the save was over: as long as the trainer lives, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from fastload import protocol
from fastload.client.connector import Connector
from fastload.client.consumer import Consumer
from fastload.errors import FastloadError


class Saver(Consumer):
    """See the module's text. Thread-safe."""

    def __init__(self, connector: Connector, storage_options: Mapping[str, Any] | None, name: str) -> None:
        self._save: protocol.Save | None = None
        self._fd = -1
        self._state: protocol.SaveState | None = None
        self._hand_overs = 0  # of the image, to one service after the other
        self._wants_back = False
        self.ended: Callable[[], object] = lambda: None  # called, by any thread, when no service can be had any more
        super().__init__(connector, storage_options, name)

    def hand_over(self, save: protocol.Save, fd: int) -> None:
        """Have the service take the image of this descriptor, which stays ours to close once it was given back."""
        self._enter()
        with self._changed:
            self._save, self._fd = save, fd
            self._send_save()

    @property
    def state(self) -> protocol.SaveState | None:
        """What the service has said last; None before it has said anything."""
        with self._changed:
            return self._state

    def wait_level(self, level: protocol.Level, what: str, timeout_s: float) -> protocol.SaveState:
        """Wait until the save has come so far; what it has come to, with the error that ended it. `WaitTimeoutError`
        says `what` was waited for.
        """
        with self._changed:
            if self._state is not None and has_reached(self._state, level):
                return self._state
        self._enter()
        with self._changed:
            self._wait(lambda: self._state is not None and has_reached(self._state, level), "service", what, timeout_s)
            assert self._state is not None
            return self._state

    def take_back(self, what: str, timeout_s: float) -> bool:
        """Wait until the service reads the image no more, and has what it holds elsewhere. False where it was handed to
        another service before, which may be hung and read it when it goes on: then it must not be written to any more.
        """
        with self._changed:
            if self._save is None or not self._save.image_bytes:
                return self._hand_overs == 1
        self._enter()
        with self._changed:
            self._wants_back = True
            self._send(protocol.TakeBack(self._save.attempt, self._save.rank))
            self._wait(lambda: not self._wants_back, "service", what, timeout_s)
        self.close_when_over()
        return self._hand_overs == 1

    def close_when_over(self) -> None:
        """Close the connection where there is nothing left to say."""
        with self._changed:
            is_needed = self._save is None or self._save.image_bytes or self._state is None or not is_over(self._state)
        if not is_needed:
            self.close()

    def _send_save(self) -> None:
        if self._save is not None and self._connection is not None:
            self._hand_overs += bool(self._save.image_bytes)
            self._connection.send(self._save, [self._fd] if self._save.image_bytes else [])

    def _on_ended(self, error: FastloadError) -> None:
        super()._on_ended(error)
        with self._changed:
            is_ours = self._save is None or self._save.image_bytes > 0
        if is_ours:  # what was given back is on the disk, and filled anew here
            self.ended()

    def _send_everything(self) -> None:
        super()._send_everything()
        if self._state is None or not is_over(self._state):
            self._send_save()
        if self._wants_back and self._save is not None:
            self._send(protocol.TakeBack(self._save.attempt, self._save.rank))

    def _take(self, message: protocol.FromService) -> None:
        match message:
            case protocol.SaveState():
                if not (message.error_name == "AccessDeniedError" and self._renew_credentials()):
                    self._state = message
                if self._connection is not None:
                    self._connection.was_served()
            case protocol.Returned():
                if self._save is not None:
                    self._save = msgspec.structs.replace(self._save, image_bytes=0)
                self._wants_back = False
            case _:
                super()._take(message)


def has_reached(state: protocol.SaveState, level: protocol.Level) -> bool:
    """Whether a wait for this level is over."""
    waits_in_vain = is_over(state) or (level == "store" and state.error_name) or (level == "disk" and state.no_disk)
    return is_at(state, level) or bool(waits_in_vain)


def is_at(state: protocol.SaveState, level: protocol.Level) -> bool:
    """Whether it is so safe."""
    return state.level != "" and protocol.LEVELS.index(state.level) >= protocol.LEVELS.index(level)


def is_over(state: protocol.SaveState) -> bool:
    """Whether the service has nothing left to do."""
    return state.level == "store" or (state.error_name != "" and not state.goes_on)
