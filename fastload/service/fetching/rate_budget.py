"""So many bytes a second on average: a token bucket, with time passed in. What is written to disk has one, and what
warming fetches.
"""

from __future__ import annotations


class RateBudget:
    """What was not used lately may be used at once, up to `saved_s` seconds of it. Something is let through while
    anything is left, so that it may be larger than all of that, and what it takes beyond is missing afterwards.
    """

    def __init__(self, bytes_per_s: int, now: float, saved_s: float, *, begins_full: bool = True) -> None:
        """0 bytes a second: no limit. `begins_full`: as if nothing had been used lately."""
        self._saved_s, self._at = saved_s, now
        self._bytes_per_s = bytes_per_s
        self._left = bytes_per_s * saved_s if begins_full else 0.0

    @property
    def bytes_per_s(self) -> int:
        """The limit; 0: none."""
        return self._bytes_per_s

    def change(self, bytes_per_s: int, now: float) -> None:
        """Another limit from now on; a debt stays."""
        self._refill(now)
        self._bytes_per_s = bytes_per_s
        self._left = min(self._left, bytes_per_s * self._saved_s) if bytes_per_s else 0.0

    def take(self, byte_count: int, now: float, *, on_credit: bool = False) -> bool:
        """Whether so many bytes may be used now, which are then counted. `on_credit`: they will be used anyway, and
        others wait for that.
        """
        self._refill(now)
        if self._bytes_per_s and self._left <= 0 and not on_credit:
            return False
        self._left -= byte_count
        return True

    def give_back(self, byte_count: int) -> None:
        """What was let through was not used."""
        self._left += byte_count

    def wait_s(self, now: float, beside: int = 0) -> float:
        """In how many seconds something is let through again, if `beside` bytes are used now; 0: now."""
        self._refill(now)
        left = self._left - beside
        if not self._bytes_per_s or left > 0:
            return 0.0
        return (1 - left) / self._bytes_per_s

    def _refill(self, now: float) -> None:
        earned = self._bytes_per_s * (now - self._at)
        self._left = min(self._left + earned, self._bytes_per_s * self._saved_s) if self._bytes_per_s else 0.0
        self._at = now
