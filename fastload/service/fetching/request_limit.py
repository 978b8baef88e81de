"""How many requests one endpoint of a store should be sent at a time: found by measuring, while it serves.

Pure: from what came of each request, and when there was nothing to ask for, follows a `limit`; time is passed in.

What is compared is goodput, the bytes that come a second. While `limit` requests are in flight all the time, Little's
law gives it as limit x bytes / seconds of a request, and averages over requests settle much sooner than counts of bytes
over time do. So a *round* takes requests that began under the present limit, and only those during which there was
always more to ask for: with slack nothing is learnt, and nothing changes.

    start    Four requests give first byte and duration. Of a duration T the body takes T - t, so keeping on the wire
             what was on it takes T / (T - t) times as many requests. Where an earlier run knew the store, it begins
             with what that came to, and stays there if the four answers are like those.
    trials   In turn, the limit is raised by a quarter and lowered by a fifth for a round. A raise stays if a third or
             more of it shows up as goodput, and then more is tried at once; a cut stays if next to nothing is lost. So
             the limit comes to rest where goodput bends, and what hides in a store's queues alone is given back.
    change   Where the first byte, or goodput at an unchanged limit, is not what it was, the start's rule gives the new
             limit from the bodies that were on the wire before, and trials begin at once.
    refusal  On throttling and timeouts the limit falls to 0.7 of itself, once for all requests that were under way.
             Just below where a store throttled there is a ceiling for a while, longer each time.

    starved  A process that waits for cores is late to see what has come: a first byte, an end, a slot that is free.
             None of this is the store's doing, and none a sign of too many requests. So first bytes are compared
             without their threads' waits, which the kernel counts. Where waits take a good part of a request's time,
             fewer requests are not tried, a drop of goodput is no change of the store, and a timeout no refusal. While
             a slot lies idle between two requests its time counts as theirs, so goodput is not overestimated. And as
             many more are allowed as that time is longer than it would be with a core, up to twice: Little's law holds
             for the time at the store, and what waits for a core asks nothing of it.

What was rejected: the least duration ever seen as the measure of what is needed (as congestion control by delay has
it). One quick answer of a store whose answers vary would hold the limit down.

Some requests are sent a second time (`Hedger`): one that takes far longer than its peers, for a chunk that is needed
soon. A second request costs the store what the first did, so few may be: three in a hundred, and never while the
store throttles. What is late is measured by those that came, not by those that hang: one in a hundred that takes fifty
times as long does not change the middle, and hardly the last twentieth.
"""

from __future__ import annotations

import enum
import math
import resource
import statistics
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastload.service.fetching.warming_limit import LinkMeter, Links
from fastload.store.watch import Attempt, Outcome
from fastload.timing.histogram import Histogram

# About one shard: what is needed first does not share a slow link with what is needed later.
AT_FIRST = 8
# While what a consumer reads first is on its way, no more at a time with what is fetched ahead: enough to keep a link
# busy for the moment in which the first answers have come and the last have not.
AT_FIRST_WITH_OTHERS = AT_FIRST // 2
# Threads, sockets and buffers are cheap up to here, and no store asks for more.
REQUESTS_MAX = 256
# What is unpacked here is no store's business. The name of such an "endpoint" ends in this, and so many ranges are
# waited for at a time: those of some objects, each of which takes a thread and a buffer.
UNPACKED, _UNPACKED_MAX = " (unpacked)", 32


@dataclass(frozen=True, slots=True)
class Tuning:
    """The numbers of `Controller`, side by side. What they come to is seen in `bench.prefetch`, and over stores of
    several kinds in `tests/service/test_request_limit.py`.
    """

    # The start
    start_count: int = 4  # requests
    start_factor_max: float = 4.0
    like_within: float = 2.0  # four answers that came with others say little of a rate
    # Rounds: a few requests go on in the step in which they began, which says too much of a low limit.
    round_count_min: int = 8
    trial_count_min: int = 16
    # Trials. When a raise paid in full the next is larger, but less than double: no trial is far above what is needed.
    raise_by: float = 1.25
    raise_fast_by: float = 1.5
    cut_by: float = 0.8
    cut_fast_by: float = 0.5
    raise_every_s: float = 3.0
    cut_every_s: float = 6.0
    cut_to_min: int = 3  # to try fewer costs what they lack for a second or two, and would save nothing from here on
    slow_bytes_per_s: float = 20e6  # a connection that is slower is held up by others: no store is so slow by itself
    # What a trial must gain or may lose: of the change of the limit; and all cuts together, of the best goodput.
    pays_share: float = 0.3
    pays_fully_share: float = 0.6
    loses_share: float = 0.1
    loses_in_all_share: float = 0.03
    undo_by: float = 2.0  # where they lost more: at most doubled, and again if that was not enough
    # Connections that wait for their next request are of no use either: a few more than Little's law has it.
    of_use_times: float = 1.2
    of_use_more: int = 3
    rates_s: float = 30.0  # for how long a connection's rate counts as possible
    rates_count: int = 100
    # A store that is not what it was
    changed_share: float = 0.25
    first_byte_changed_share: float = 0.5
    first_byte_noise_s: float = 0.01
    # Refusals
    refused_by: float = 0.7
    ceiling_share: float = 0.9
    ceiling_s: float = 5.0
    ceiling_s_max: float = 60.0
    throttling_s: float = 5.0  # how long after a refusal a store counts as throttling
    # Waits for cores: from this share of a request's time on, or from the second where there were such before.
    starved_share: float = 0.2
    still_starved_share: float = 0.1
    stretch_max: float = 2.0


TUNING = Tuning()


class _Mode(enum.Enum):
    START = "start"
    BASE = "base"  # measuring the limit that stands
    RAISED = "raised"
    CUT = "cut"


@dataclass(frozen=True, slots=True)
class Learnt:
    """What is known of an endpoint, for figures and for a later start. `first_byte_s` is None where stores do not say.

    `throttled_at` is the least limit at which it throttled, 0 where it never did, or has taken as much since.
    """

    limit: int
    bytes_per_s: float
    first_byte_s: float | None
    connection_bytes_per_s: float
    throttled_at: int

    @property
    def is_usable(self) -> bool:
        """Whether it was measured, and makes sense: it may come from a file."""
        rates = self.bytes_per_s, self.connection_bytes_per_s
        return self.limit >= 1 and all(math.isfinite(rate) and rate > 0 for rate in rates)

    @property
    def limit_to_start(self) -> int:
        """The limit for a start: below the one at which the store throttled."""
        if self.throttled_at <= 0:
            return self.limit
        return max(1, min(self.limit, int(self.throttled_at * TUNING.ceiling_share)))


@dataclass(frozen=True, slots=True)
class _Round:
    """What the requests of a round say."""

    bytes_per_s: float
    seconds: float  # of a request
    body_seconds: float  # of those, from its first byte on
    byte_count: float  # of a request
    first_byte_s: float | None  # the median, without waits for cores
    first_byte_error_s: float  # of that median
    starved_share: float  # waits for cores, of the time of a request and its slot

    @property
    def on_the_wire(self) -> float:
        """What part of a request's time its body takes."""
        return max(1.0 / TUNING.start_factor_max, self.body_seconds / self.seconds)

    @property
    def connection_bytes_per_s(self) -> float:
        return self.byte_count / max(1e-6, self.body_seconds)


class Controller:
    """Of one endpoint. `limit` is how many requests may be in flight now."""

    def __init__(
        self,
        requests_max: int = REQUESTS_MAX,
        *,
        fixed: int = 0,
        start: int = AT_FIRST,
        known: Learnt | None = None,
        tuning: Tuning = TUNING,
    ) -> None:
        """`fixed`: the limit, for good. `start`: the first one. `known`: what an earlier run learnt, if it did."""
        self._tuning = tuning
        self._max = max(1, requests_max)
        self._fixed, self._start = fixed, start
        self._known = known if known is not None and known.is_usable else None
        self._tried = max(1, min(fixed or (self._known.limit_to_start if self._known else start), self._max))
        self.limit = self._tried  # what is tried, and more where requests wait for cores: `_stretch` times as many
        self._stretch = 1.0
        self.throttled_count = self.timed_out_count = 0
        self._mode = _Mode.START
        self._round: list[Attempt] = []
        self._late_s = 0.0  # of the round: between the ends of its requests and the calls that said so
        self._since = float("-inf")  # requests that began earlier belong to another limit, or had slack
        self._base: _Round | None = None
        self._base_limit = self._tried
        self._measured: tuple[int, _Round] | None = None  # the limit that stood last and was measured
        self._step, self._cut = self._tuning.raise_by, self._tuning.cut_by
        self._best_bytes_per_s, self._best_limit = 0.0, 0  # of the limits that stood
        self._floor, self._floor_until = 1, float("-inf")
        self._rates: deque[tuple[float, float]] = deque(maxlen=self._tuning.rates_count)
        self._raise_at = self._cut_at = float("-inf")
        self._refused_at = self._throttled_at = float("-inf")
        self._ceiling, self._ceiling_until, self._ceiling_s = self._max, float("-inf"), self._tuning.ceiling_s
        self._least_throttled = 0
        self.saturated_at = 0  # so many bring as much as more do, as a trial has shown; 0: none has

    # What happens

    def slack(self, now: float) -> None:
        """Fewer requests are in flight than may be, since there is nothing more to ask for."""
        self._since = now
        self._clear()

    def ended(self, attempt: Attempt, now: float) -> None:
        """A request has come to its end."""
        match attempt.outcome:
            case Outcome.GOOD:
                self._good(attempt, now)
            case Outcome.THROTTLED:
                self.throttled_count += 1
                self._throttled_at = now
                self._refused(attempt, now)
            case Outcome.TIMED_OUT:
                self.timed_out_count += 1
                if attempt.waited_s < self._tuning.starved_share * attempt.seconds:
                    self._refused(attempt, now)
            case Outcome.FAILED | Outcome.CANCELLED:  # says nothing of how much the store can take
                pass

    # What is known

    def throttling(self, now: float) -> bool:
        """Whether the store has refused requests just now."""
        return now < self._throttled_at + self._tuning.throttling_s

    def learnt(self) -> Learnt:
        """See `Learnt`; zeros before the first round."""
        if self._measured is None:
            return Learnt(self._base_limit, 0.0, None, 0.0, self._least_throttled)
        limit, base = self._measured
        return Learnt(limit, base.bytes_per_s, base.first_byte_s, base.connection_bytes_per_s, self._least_throttled)

    # Rounds

    def _good(self, attempt: Attempt, now: float) -> None:
        if attempt.began_s < self._since or not attempt.byte_count:
            return
        self._round.append(attempt)
        self._late_s += max(0.0, now - attempt.ended_s)
        if len(self._round) >= self._round_count():
            found = _summary(self._round, self.limit, self._late_s / len(self._round))
            self._clear()
            self._decide(found, now)

    def _round_count(self) -> int:
        if self._mode is _Mode.START:
            return self._tuning.start_count
        each = 1 if self._step > self._tuning.raise_by else 2
        return max(
            self._tuning.round_count_min if self._mode is _Mode.BASE else self._tuning.trial_count_min,
            each * self.limit,
        )

    def _decide(self, found: _Round, now: float) -> None:
        self._rates.append((now, found.connection_bytes_per_s))
        self._stretch = _stretch(self._stretch, found.starved_share)
        if self._mode is _Mode.START and self._known is not None and _is_like(found, self._known):
            self._settle(self._tried, None, now)
            self._raise_at, self._cut_at = now + 2 * self._tuning.cut_every_s, now + self._tuning.cut_every_s
        elif self._mode is _Mode.START:
            limit = self._tried if self._known is None else min(self._tried, self._start)
            self._settle(round(limit / found.on_the_wire), None, now)
            self._try_first(cut=found.connection_bytes_per_s < self._tuning.slow_bytes_per_s, now=now)
        elif self._changed(found):
            self._follow(found, now)
        elif self._mode is _Mode.BASE:
            self._base, self._measured = found, (self._tried, found)
            if self._tried >= self._least_throttled and now > self._throttled_at + self._tuning.ceiling_s_max:
                self._least_throttled = 0  # it takes that by now
            if not self._fell_below(found, now):
                self._try(now)
        else:
            self._judge(found, now)

    def _fell_below(self, found: _Round, now: float) -> bool:
        """Whether cuts, each of which seemed to lose nothing, have lost something together. If so some are undone, and
        for a while there is a floor.
        """
        if self._tried >= self._best_limit:  # as much as can be had, whatever it was once
            self._best_limit, self._best_bytes_per_s = self._tried, found.bytes_per_s
            return False
        if found.bytes_per_s >= (1.0 - self._tuning.loses_in_all_share) * self._best_bytes_per_s:
            return False
        self._floor, self._floor_until = self._tried + 1, now + self._tuning.ceiling_s_max
        self._settle(min(self._best_limit, max(self._tried + 1, round(self._tried * self._tuning.undo_by))), None, now)
        self._cut_at = self._raise_at = now + self._tuning.raise_every_s
        return True

    def _try(self, now: float) -> None:
        """The standing limit has been measured: try another, if it is time to."""
        ceiling = min(self._ceiling_now(now), self._of_use(now))
        raised = min(max(self._tried + 1, round(self._tried * self._step)), ceiling)
        cut = min(self._tried - 1, int(self._tried * self._cut))
        may_raise = now >= self._raise_at and raised > self._tried
        may_cut = now >= self._cut_at and cut >= max(
            self._tuning.cut_to_min, self._floor if now < self._floor_until else 1
        )
        may_cut = may_cut and self._stretch == 1.0
        # Of both the one that has waited longer: where a round takes seconds, a raise would always be due again.
        if may_raise and not (may_cut and self._cut_at < self._raise_at):
            self._set(raised, _Mode.RAISED, now)
        elif may_cut:
            self._set(cut, _Mode.CUT, now)
        else:
            self._set(self._tried, _Mode.BASE, now)

    def _of_use(self, now: float) -> int:
        """By Little's law, how many would do for the present goodput were no connection held up by the others, and
        some more. Where connections hold each other up a little that is an estimate from above.
        """
        assert self._base is not None, "nothing was measured"
        fastest = max(rate for at, rate in self._rates if at >= now - self._tuning.rates_s)
        first_byte_s = self._base.seconds - self._base.body_seconds
        seconds = first_byte_s + self._base.byte_count / fastest
        in_flight = self._tuning.of_use_times * self._base.bytes_per_s * seconds / self._base.byte_count
        return self._tuning.of_use_more + math.ceil(in_flight)

    def _judge(self, found: _Round, now: float) -> None:
        """A trial has been measured."""
        assert self._base is not None, "a trial without anything to compare it with"
        gain = found.bytes_per_s / self._base.bytes_per_s - 1.0
        change = self._tried / self._base_limit - 1.0
        if self._mode is _Mode.RAISED and gain >= self._tuning.pays_share * change:
            self._step = (
                self._tuning.raise_fast_by if gain >= self._tuning.pays_fully_share * change else self._tuning.raise_by
            )
            self.saturated_at = 0
            self._settle(self._tried, found, now)
            self._cut_at = now + self._tuning.cut_every_s
            self._try(now)
        elif self._mode is _Mode.RAISED:
            # Between a large step and none there may be a small one.
            self._raise_at = now if self._step > self._tuning.raise_by else now + self._tuning.raise_every_s
            self._step = self._tuning.raise_by
            self.saturated_at = self._base_limit
            self._settle(self._base_limit, self._base, now)
        elif (
            gain >= self._tuning.loses_share * change
            and found.bytes_per_s >= (1.0 - self._tuning.loses_in_all_share) * self._best_bytes_per_s
        ):
            self._raise_at = now + self._tuning.raise_every_s
            self.saturated_at = self._tried
            self._settle(self._tried, found, now)
            self._try(now)
        else:
            self._cut_at = now + self._tuning.cut_every_s
            if self._cut < self._tuning.cut_by:  # between a large step and none there may be a small one
                self._cut_at = self._raise_at = now
            self._cut = self._tuning.cut_by
            self._settle(self._base_limit, self._base, now)

    def _changed(self, found: _Round) -> bool:
        """Whether the store is not what it was."""
        base = self._base
        if base is None:
            return False
        if base.first_byte_s is not None and found.first_byte_s is not None:
            off_s = abs(found.first_byte_s - base.first_byte_s)
            noise_s = self._tuning.first_byte_noise_s + 3 * (base.first_byte_error_s + found.first_byte_error_s)
            if off_s > max(noise_s, self._tuning.first_byte_changed_share * base.first_byte_s):
                return True
        off = abs(found.bytes_per_s / base.bytes_per_s - 1.0)
        return self._mode is _Mode.BASE and self._stretch == 1.0 and off > self._tuning.changed_share

    def _follow(self, found: _Round, now: float) -> None:
        """Keep as many bodies on the wire as there were before the change, and begin to try at once."""
        assert self._base is not None, "nothing to compare with"
        last = self._rates.pop()
        self._rates.clear()
        self._rates.append(last)
        bodies = self._base_limit * self._base.on_the_wire
        self._try_first(cut=found.connection_bytes_per_s < self._tuning.slow_bytes_per_s, now=now)
        limit = round(bodies / found.on_the_wire)
        if self._mode is _Mode.BASE and abs(limit - self._tried) <= 1:
            self._settle(self._tried, found, now)
            self._try(now)
        else:
            self._settle(limit, None, now)

    def _try_first(self, *, cut: bool, now: float) -> None:
        """Nothing is known of other limits. With `cut` a connection is slow, perhaps since there are too many."""
        self._best_bytes_per_s, self._best_limit, self._floor = 0.0, 0, 1
        self.saturated_at = 0
        self._step = self._tuning.raise_by
        self._cut = self._tuning.cut_fast_by if cut else self._tuning.cut_by
        self._cut_at = now
        self._raise_at = now + self._tuning.raise_every_s if cut else now

    # The limit

    def _settle(self, limit: int, base: _Round | None, now: float) -> None:
        """This limit stands; `base`: it has been measured."""
        self._base = base
        self._set(max(1, min(limit, self._ceiling_now(now))), _Mode.BASE, now)
        self._base_limit = self._tried

    def _set(self, limit: int, mode: _Mode, now: float) -> None:
        allowed = max(limit, min(round(limit * self._stretch), self._ceiling_now(now)))
        if allowed != self.limit:
            self._since = now
        self._clear()
        self._mode = mode
        if not self._fixed:
            self._tried, self.limit = limit, allowed

    def _clear(self) -> None:
        self._round.clear()
        self._late_s = 0.0

    def _ceiling_now(self, now: float) -> int:
        return min(self._ceiling, self._max) if now < self._ceiling_until else self._max

    def _refused(self, attempt: Attempt, now: float) -> None:
        if attempt.began_s < self._refused_at:
            return
        at, self._stretch, self.saturated_at = self.limit, 1.0, 0
        if attempt.outcome is Outcome.THROTTLED:
            again = now < self._ceiling_until + self._ceiling_s
            self._ceiling_s = min(self._tuning.ceiling_s_max, 2 * self._ceiling_s) if again else self._tuning.ceiling_s
            self._ceiling, self._ceiling_until = max(1, int(at * self._tuning.ceiling_share)), now + self._ceiling_s
            self._least_throttled = min(at, self._least_throttled or at)
        else:  # no ceiling keeps the limit from going back at once to what was best
            self._best_bytes_per_s, self._best_limit = 0.0, 0
        self._refused_at, self._step = now, self._tuning.raise_by
        self._settle(int(at * self._tuning.refused_by), None, now)
        self._raise_at = self._cut_at = now + self._tuning.raise_every_s


def _stretch(before: float, starved_share: float) -> float:
    """How many times as many requests keep at the store what would be there if none waited for a core."""
    if starved_share < (TUNING.starved_share if before == 1.0 else TUNING.still_starved_share):
        return 1.0
    stretch = min(TUNING.stretch_max, 1.0 / max(1e-6, 1.0 - starved_share))
    # What hardly changes stays: each change begins a round anew.
    return stretch if before == 1.0 or abs(stretch / before - 1.0) > TUNING.changed_share else before


def _summary(attempts: Sequence[Attempt], in_flight: int, late_s: float) -> _Round:
    """Of these, without the slowest eighth: a few answers that hang say nothing of the store. `late_s` is how long
    after its end a request's slot was free.
    """
    kept = sorted(attempts, key=lambda each: each.seconds / each.byte_count)
    kept = kept[: len(kept) - len(kept) // 8]
    byte_count = statistics.fmean(each.byte_count for each in kept)
    seconds = statistics.fmean(each.seconds for each in kept)
    idle_s = late_s + statistics.fmean(each.queued_s for each in kept)
    waited_s = idle_s + min(seconds, statistics.fmean(each.waited_s for each in kept))
    first_bytes = [each.first_byte_s for each in kept if each.first_byte_s is not None]
    middle_s, error_s = _median(
        [max(0.0, each.first_byte_s - each.first_waited_s) for each in kept if each.first_byte_s is not None]
    )
    return _Round(
        bytes_per_s=in_flight * byte_count / (seconds + idle_s),
        seconds=seconds,
        body_seconds=seconds - sum(first_bytes) / len(kept),
        byte_count=byte_count,
        first_byte_s=middle_s,
        first_byte_error_s=error_s,
        starved_share=waited_s / (seconds + idle_s),
    )


def _is_like(found: _Round, known: Learnt) -> bool:
    """Whether the store answers as an earlier run knew it: the first byte as soon, and at half the rate at least. More
    says nothing: the first answers have the link for themselves.
    """
    if found.connection_bytes_per_s < known.connection_bytes_per_s / TUNING.like_within:
        return False
    if found.first_byte_s is None or known.first_byte_s is None:
        return found.first_byte_s is known.first_byte_s
    return (
        abs(found.first_byte_s - known.first_byte_s)
        <= TUNING.first_byte_noise_s + TUNING.first_byte_changed_share * known.first_byte_s
    )


def _median(values: Sequence[float]) -> tuple[float | None, float]:
    """The median, None of nothing, and its standard error from the middle half's width."""
    if len(values) < 2:
        return (values[0] if values else None), 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, 0.93 * (high - low) / math.sqrt(len(values))


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


# Single objects may come from any number of hosts, and each tick looks at all that are known.
_ENDPOINTS_MAX = 64


@dataclass(slots=True)
class Endpoint:
    """Of a store, as far as requests to it are measured."""

    controller: Controller
    hedger: Hedger
    meter: LinkMeter = field(default_factory=LinkMeter)
    in_flight: int = 0  # without those that lost to another one: they may hang for long, and nothing waits for them
    request_times: Histogram = field(default_factory=Histogram)
    first_byte_times: Histogram = field(default_factory=Histogram)

    def ended(self, attempt: Attempt, now: float) -> None:
        """A request has come to its end."""
        self.controller.ended(attempt, now)
        self.hedger.ended(attempt)
        if attempt.outcome is Outcome.GOOD:
            self.request_times.add(attempt.seconds)
            if attempt.first_byte_s is not None:
                self.first_byte_times.add(attempt.first_byte_s)

    @property
    def free(self) -> int:
        """How many more requests may be started."""
        return max(0, self.controller.limit - self.in_flight)

    @property
    def refusals(self) -> dict[str, int]:
        """How many requests it has refused."""
        return {"throttled": self.controller.throttled_count, "timed_out": self.controller.timed_out_count}

    def stats(self) -> dict[str, float]:
        """See docs/protocol.md."""
        learnt = self.controller.learnt()
        return {
            "requests_allowed": self.controller.limit,
            "requests_in_flight": self.in_flight,
            "requests": self.hedger.request_count,
            "bytes_per_s": learnt.bytes_per_s,
            "connection_bytes_per_s": learnt.connection_bytes_per_s,
            "first_byte_s": -1.0 if learnt.first_byte_s is None else learnt.first_byte_s,
            "throttled_at": learnt.throttled_at,
            "saturated_at": self.controller.saturated_at,
        }


class Endpoints:
    """All endpoints of stores that were used lately."""

    def __init__(self, requests_max: int = REQUESTS_MAX, fixed: int = 0, hedger: Callable[[], Hedger] = Hedger) -> None:
        """`requests_max`: at a time, over all. `fixed`: see `Controller`."""
        self.requests_max = requests_max
        self.known: Mapping[str, Learnt] = {}  # what earlier runs learnt
        self._fixed, self._hedger = fixed, hedger
        self._endpoints: dict[str, Endpoint] = {}  # the one used last is the last
        self.meter = LinkMeter()
        self._forgotten: Counter[str] = Counter()  # what was refused by those that are not known any more

    @property
    def limit(self) -> int:
        """How many requests may be in flight, over all endpoints."""
        return sum(each.controller.limit for each in self._endpoints.values()) or self._new("").controller.limit

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self._endpoints.values())

    def free_at(self, name: str) -> int:
        """How many more requests may be sent to an endpoint now; less than 0 where more are in flight than may be."""
        found = self._endpoints.get(name)
        return self._new(name).controller.limit if found is None else found.controller.limit - found.in_flight

    def reserved_at(self, name: str) -> int:
        """How many of those places are not for what is fetched ahead, while what a consumer reads first is on its way
        from there.
        """
        found = self._endpoints.get(name)
        limit = self._new(name).controller.limit if found is None else found.controller.limit
        return max(0, limit - AT_FIRST_WITH_OTHERS)

    def use(self, name: str) -> Endpoint:
        """The endpoint, which was used last from now on. Of many, the one that was used longest ago is forgotten."""
        endpoint = self._endpoints.pop(name, None) or self._new(name)
        if len(self._endpoints) >= _ENDPOINTS_MAX:
            idle = next((other for other, each in self._endpoints.items() if not each.in_flight), None)
            if idle is not None:
                self._forgotten.update(self._endpoints.pop(idle).refusals)
        self._endpoints[name] = endpoint
        return endpoint

    def slack(self, now: float, held_back: Collection[str]) -> None:
        """All that there is to ask for now has been started, except at endpoints where some is `held_back`."""
        for name, endpoint in self._endpoints.items():
            if endpoint.free and name not in held_back:
                endpoint.controller.slack(now)

    def items(self) -> Iterable[tuple[str, Endpoint]]:
        """Each, by its name."""
        return self._endpoints.items()

    @property
    def links(self) -> Links:
        """What was measured of the node's link, and of each endpoint."""
        return Links(
            self.meter.bytes_per_s,
            lambda name: self._endpoints[name].meter.bytes_per_s if name in self._endpoints else 0.0,
        )

    def begin(self, name: str, now: float) -> Endpoint:
        """A request begins: its endpoint."""
        endpoint = self.use(name)
        for meter, in_flight in ((self.meter, self.in_flight), (endpoint.meter, endpoint.in_flight)):
            if not in_flight:
                meter.began(now)
        endpoint.in_flight += 1
        endpoint.hedger.request_count += 1
        return endpoint

    def came(self, endpoint: Endpoint, byte_count: int, now: float) -> None:
        """A request has brought so many bytes."""
        self.meter.came(byte_count, now)
        endpoint.meter.came(byte_count, now)

    def learnt(self) -> dict[str, tuple[Learnt, int]]:
        """What is known of each by now, and how many requests it was sent."""
        return {name: (each.controller.learnt(), each.hedger.request_count) for name, each in self._endpoints.items()}

    def stats(self) -> dict[str, Any]:
        """Of all together, and of each."""
        refusals = self._forgotten.copy()
        for endpoint in self._endpoints.values():
            refusals.update(endpoint.refusals)
        return {
            "requests_allowed": self.limit,
            "requests_in_flight": self.in_flight,
            "throttled_requests": refusals["throttled"],
            "timed_out_requests": refusals["timed_out"],
            "endpoints": {name: endpoint.stats() for name, endpoint in self._endpoints.items()},
        }

    def _new(self, name: str) -> Endpoint:
        known = self.known.get(name)
        fixed = _UNPACKED_MAX if name.endswith(UNPACKED) else self._fixed
        return Endpoint(Controller(self.requests_max, fixed=fixed, known=known), self._hedger())


def requests_max() -> int:
    """The most requests at a time: a quarter of the descriptors that this process may open."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(REQUESTS_MAX, descriptors // 4))
