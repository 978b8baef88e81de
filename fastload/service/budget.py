"""How much may be written to disk: so many bytes a second on average, since flash wears.

A token bucket. What was not used lately may be used at once, up to ten seconds of it; a write is let through while
anything is left, so that a chunk may be larger than all of that, and what it takes beyond is missing afterwards. Pure:
the time is passed in.
"""

from __future__ import annotations

_SAVED_S = 10.0


class WriteBudget:
    """Used by one thread."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        """0 bytes a second: no limit."""
        self._bytes_per_s, self._left, self._at = bytes_per_s, bytes_per_s * _SAVED_S, now

    def change(self, bytes_per_s: int, now: float) -> None:
        """Another limit from now on; a debt stays."""
        self._refill(now)
        self._bytes_per_s = bytes_per_s
        self._left = min(self._left, bytes_per_s * _SAVED_S) if bytes_per_s else 0.0

    def take(self, byte_count: int, now: float, *, on_credit: bool = False) -> bool:
        """Whether a write of so many bytes may be made now, which is then counted. `on_credit`: it will be made anyway,
        and others wait for it.
        """
        self._refill(now)
        if self._bytes_per_s and self._left <= 0 and not on_credit:
            return False
        self._left -= byte_count
        return True

    def give_back(self, byte_count: int) -> None:
        """A write that was let through was not made."""
        self._left += byte_count

    def wait_s(self, now: float) -> float:
        """In how many seconds a write may be made again; 0: now."""
        self._refill(now)
        if not self._bytes_per_s or self._left > 0:
            return 0.0
        return (1 - self._left) / self._bytes_per_s

    def _refill(self, now: float) -> None:
        earned = self._bytes_per_s * (now - self._at)
        self._left = min(self._left + earned, self._bytes_per_s * _SAVED_S) if self._bytes_per_s else 0.0
        self._at = now
