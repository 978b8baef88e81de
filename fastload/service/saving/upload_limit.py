"""How many segments are sent to one bucket at a time: found by measuring, as for reads; and what gives way to loaders.

Pure: time is passed in. The limit is that of `Controller`, whose rounds are short here: a segment takes seconds, and is
an average by itself. It grows while goodput does, gives back what only lengthens a queue, and falls at once where the
store refuses or does not answer; what it has found stays for the saves that follow. First bytes say nothing: an answer
begins when all was sent.

A loader whose thread waits for bytes of a store goes before a save that nobody waits for: of that one upload is in
flight meanwhile, so that it never starves. Loaders that are ahead are no reason to hold anything back. Somebody waits
for a save where a trainer wants its image back; who waits for a save to be stored does not train meanwhile, and then
its loader soon has all that it may fetch ahead.

A segment goes in one request, and not as parts of an upload, which would be abandoned where a service dies: nothing is
seen of half a PUT, and what a failure costs is at most one segment for each that was in flight.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastload.service.fetching.request_limit import Controller, Tuning
from fastload.store.watch import Attempt

# At first, before anything was measured; and more gain nothing anywhere that was seen.
AT_FIRST, UPLOADS_MAX = 4, 32
_TUNING = Tuning(start_count=2, round_count_min=4, trial_count_min=4)
# For so long after its last wait a loader counts as waiting: between two batches none waits for a moment.
WAITED_S = 0.5


class UploadLimit:
    """See the module's text. Of one bucket."""

    def __init__(self, uploads_max: int = UPLOADS_MAX) -> None:
        self._controller = Controller(uploads_max, start=AT_FIRST, tuning=_TUNING)
        self.in_flight = 0
        self._loader_waited_at = -math.inf

    @property
    def limit(self) -> int:
        """While no loader waits."""
        return self._controller.limit

    def loader_waits(self, now: float) -> None:
        """A thread of a loader waits for a store."""
        self._loader_waited_at = now

    def has_room(self, now: float, *, is_waited_for: bool) -> bool:
        """Whether one more may be begun, for a save that somebody waits for or not."""
        gives_way = now < self._loader_waited_at + WAITED_S and not is_waited_for
        return self.in_flight < (1 if gives_way else self.limit)

    def began(self) -> None:
        self.in_flight += 1

    def ended(self, attempts: list[Attempt], now: float) -> None:
        """An upload has come to its end, with these attempts."""
        self.in_flight -= 1
        for attempt in attempts:
            self._controller.ended(replace(attempt, first_byte_s=None, first_waited_s=0.0), now)

    def settle(self, now: float) -> None:
        """All that is to be sent now, and may be, is in flight."""
        if self.in_flight < self.limit:
            self._controller.slack(now)
