"""A save under way, for the one who has begun it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from fastload import callers, errors
from fastload.callers import public
from fastload.client.saver import has_reached, is_at, is_over
from fastload.errors import ConfigError, FastloadError, WaitTimeoutError, to_wire
from fastload.protocol import LEVELS, Level, SaveState
from fastload.waiting import wait

WAIT_S = 600.0
_NOTE = " (no byte has moved meanwhile)"
_Result = TypeVar("_Result")


class Carrier(Protocol):
    """Who brings a save to the store: the service (`client.Saver`), or this process (`Here`)."""

    @property
    def state(self) -> SaveState | None:
        """How far it is; None where that is not known yet."""
        ...

    def wait_level(self, level: Level, what: str, timeout_s: float) -> SaveState:
        """See `client.Saver`."""
        ...

    def take_back(self, what: str, timeout_s: float) -> bool:
        """See `client.Saver`."""
        ...


class Here:
    """A thread that stores in this process, which does not end before."""

    def __init__(self, state: SaveState, store: Callable[[Callable[[int], None]], None]) -> None:
        """`store` is called with what to call with the bytes that are stored, each time."""
        self._state, self._store = state, store
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="fastload-checkpoint-here").start()

    @property
    def state(self) -> SaveState:
        with self._changed:
            return self._state

    def wait_level(self, level: Level, what: str, timeout_s: float) -> SaveState:
        with self._changed:
            wait(self._changed, lambda: has_reached(self._state, level), "service", what=what, deadline_s=timeout_s)
            return self._state

    def _run(self) -> None:
        try:
            self._store(lambda byte_count: self._set(store_bytes=byte_count))
        except Exception as error:  # of any kind: who waits gets it
            name, message = to_wire(error)
            self._set(error_name=name, error_message=message)
        else:
            self._set(level="store")

    def take_back(self, what: str, timeout_s: float) -> bool:
        self.wait_level("store", what, timeout_s)
        return False  # a service that had it before may not have ended

    def _set(self, **changes: Any) -> None:
        with self._changed:
            self._state = msgspec.structs.replace(self._state, **changes)
            self._changed.notify_all()


class Stored:
    """What carries a save that is over."""

    def __init__(self, state: SaveState) -> None:
        self.state = state

    def wait_level(self, level: Level, what: str, timeout_s: float) -> SaveState:
        return self.state

    def take_back(self, what: str, timeout_s: float) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class SaveProgress:
    """How far a save is. `stall_s` is how long the bytes took to be laid out, which holds up the trainer. `reason` is
    what keeps it from the store, as a rule what that has answered last; "": nothing.
    """

    level: Level | Literal[""]  # that it has reached; "": none
    total_bytes: int
    disk_bytes: int
    store_bytes: int
    stall_s: float
    reason: str = ""


class Saving:
    """A rank's save. Thread-safe.

    Levels are promises: `memory`, that the trainer may die; `disk`, that the machine may; `store`, that this rank's
    part is in the store, and committed where that is this rank's task.
    """

    def __init__(self, folder: str, rank: int, total_bytes: int, stall_s: float, carrier: Carrier) -> None:
        self._folder, self._rank, self._total_bytes, self._stall_s = folder, rank, total_bytes, stall_s
        self.carrier = carrier

    @public
    def wait(self, level: Level = "store", timeout_s: float = WAIT_S) -> None:
        """Wait until the save has come so far. Raises what keeps it from that, `WaitTimeoutError` when time is up.

        Where it cannot be kept on disk, a wait for `disk` is one for the store, with a warning.
        """
        self._wait(level, timeout_s)

    def _wait(self, level: Level, timeout_s: float, note: str = "") -> None:
        """The same; what gives up says the note as well."""
        deadline, left_s = time.monotonic() + timeout_s, timeout_s
        checked_level(level)
        while True:
            carrier = self.carrier
            try:
                state = carrier.wait_level(level, f"{self._what(level)}{note}", left_s)
            except WaitTimeoutError as error:
                last = f" ({reason})" if (reason := self.progress().reason) else ""
                timeout = WaitTimeoutError(
                    f"{error}{last}; the save goes on: look whether the store answers, and wait again"
                )
                timeout.saving = self
                raise timeout from None
            except FastloadError:
                if carrier is self.carrier:
                    raise
                left_s = max(0.0, deadline - time.monotonic())
                continue  # another one has taken over
            if is_at(state, level):
                return
            if state.error_name and (level == "store" or is_over(state)):
                raise errors.from_wire(state.error_name, f"{state.error_message} (rank {self._rank})")
            callers.warn(
                f"{self._folder} is not kept on disk ({state.no_disk}); it is waited for until it is in the store",
                RuntimeWarning,
            )
            level, left_s = "store", max(0.0, deadline - time.monotonic())

    def wait_while_moving(self, level: Level, timeout_s: float) -> None:
        """The same, for as long as it takes: `WaitTimeoutError` where no byte has moved for `timeout_s`."""
        self._while_moving(lambda: self._wait(level, timeout_s, _NOTE))

    @property
    def is_over(self) -> bool:
        """Whether nothing more becomes of it: it is in the store, or has failed."""
        return (state := self.carrier.state) is not None and is_over(state)

    @public
    def done(self, level: Level = "store") -> bool:
        """Whether it has come so far; raises what keeps it from that for good."""
        state = self.carrier.state
        if state is not None and is_over(state) and state.error_name:
            raise errors.from_wire(state.error_name, f"{state.error_message} (rank {self._rank})")
        return state is not None and is_at(state, checked_level(level))

    def progress(self) -> SaveProgress:
        """How far it is."""
        state = self.carrier.state
        if state is None:
            return SaveProgress("", self._total_bytes, 0, 0, self._stall_s)
        reason = state.error_message or state.reason
        return SaveProgress(state.level, self._total_bytes, state.disk_bytes, state.store_bytes, self._stall_s, reason)

    def go_on(self, carrier: Carrier) -> None:
        """Another one carries it from now on."""
        self.carrier = carrier

    def take_back(self, timeout_s: float) -> bool:
        """Wait until its image is not needed; whether no process reads it. Raises what keeps it from that, and
        `WaitTimeoutError` where no byte has moved for `timeout_s`.
        """
        what = f"{self._what('disk')}, so that its memory can be used for the next save{_NOTE}"

        def take_back() -> bool:
            carrier = self.carrier
            try:
                return carrier.take_back(what, timeout_s)
            except FastloadError:
                if carrier is self.carrier:
                    raise
                return self.carrier.take_back(what, timeout_s)

        return self._while_moving(take_back)

    def _while_moving(self, wait: Callable[[], _Result]) -> _Result:
        """What `wait` gives, which is tried again where bytes have moved until its `WaitTimeoutError`."""
        while True:
            before = self._moved()
            try:
                return wait()
            except WaitTimeoutError:
                if self._moved() == before:
                    raise

    def _moved(self) -> tuple[str, int, int]:
        progress = self.progress()
        return progress.level, progress.disk_bytes, progress.store_bytes

    def _what(self, level: Level) -> str:
        return f"rank {self._rank} of the checkpoint {self._folder} to reach {level!r}"

    def __repr__(self) -> str:
        return f"Saving({self._folder!r}, rank={self._rank}, {self.progress()})"


def checked_level(level: Level, name: str = "level") -> Level:
    """The level, given as the argument of this name; `ConfigError` where it is none."""
    if level not in LEVELS:
        raise ConfigError(f'{name}={level!r} must be "memory", "disk" or "store"')
    return level
