"""Which requests are sent a second time: one that takes far longer than its peers, for a chunk that is needed soon.

Pure: told what came of each request, it says from when on a request of a size is late, and whether there is still
budget. A second request costs the store what the first did, so few may be: three in a hundred, and never while the
store throttles. What is late is measured by those that came, not by those that hang: one in a hundred that takes fifty
times as long does not change the middle, and hardly the last twentieth.
"""

from __future__ import annotations

import math

import numpy as np

from fastload.store.watch import Attempt, Outcome

SHARE_MAX = 0.03
_PEERS, _PEERS_MIN = 200, 8
_TIMES_MIDDLE, _TIMES_LAST = 3.0, 1.5
# Below this, waiting on is cheaper than asking again.
_LATE_S_MIN = 0.1


class Hedger:
    """Of one endpoint."""

    def __init__(self) -> None:
        self.request_count = self.hedge_count = 0
        # How many seconds each took, and for how many bytes; around.
        self._seconds, self._byte_counts = np.zeros(_PEERS), np.ones(_PEERS)
        self._peer_count = 0
        self._usual: dict[int, float] = {}  # what was found, by size, until the next request has ended

    def ended(self, attempt: Attempt) -> None:
        """A request has come to its end."""
        if attempt.outcome is Outcome.GOOD and attempt.byte_count:
            place = self._peer_count % _PEERS
            self._seconds[place], self._byte_counts[place] = attempt.seconds, attempt.byte_count
            self._peer_count += 1
            self._usual.clear()

    def late_after_s(self, byte_count: int) -> float | None:
        """After how long a request for so many bytes is late; None while there are too few to compare with."""
        if self._peer_count < _PEERS_MIN:
            return None
        if byte_count not in self._usual:  # all that is in flight is asked about, many times a second
            self._usual[byte_count] = self._usual_s(byte_count)
        return max(_LATE_S_MIN, self._usual[byte_count])

    def _usual_s(self, byte_count: int) -> float:
        # A smaller peer's time is stretched to this size, a larger one's taken as it is: late is never said too early.
        times = np.sort((self._seconds * np.maximum(1.0, byte_count / self._byte_counts))[: self._peer_count])
        last = times[int(0.95 * (len(times) - 1))]
        return float(max(_TIMES_MIDDLE * np.median(times), _TIMES_LAST * last))

    @property
    def has_budget(self) -> bool:
        """Whether one more is within the share, which is rounded up: the first request of all may hang."""
        return self.hedge_count < math.ceil(SHARE_MAX * self.request_count)
