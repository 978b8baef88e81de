"""Which source each number of a mixture's lane comes from, at any number of any lane.

In a *step*, weights stay the same. Source s, whose weight is the share `rate` of all, has its samples at random places
of cells of equal length: sample i of those that the lane has from the source in this step, sample c of all, comes at

    time(s, i) = (i + jitter(s, c) - lag) / rate

where `jitter`, from 0 up to 1, is the upper 53 bits of word c of splitmix64 keyed for lane and source, and `lag` is by
how many samples the source lagged its share when the step began. The numbers of the lane are the samples of all
sources in the order of their times, the source with the lower number first where two are equal. At the beginning lags
are 0; where a step of M numbers, n of them of the source, is over, the lag has grown by M * rate - n.

So wherever one looks, a source is within about a sample of its share: with e(s) for how far its number of samples is
from time * rate, each between -1 and 1, a lane's first j numbers hold j * rate + (1 - rate) * e(s) - rate * (the sum of
the others' e) of it. And nothing is in step with anything else, such as every second number with every second rank.

Random access: the number of samples before a time is known to one for each source, from its share; so a time somewhat
before the one in question is guessed, and the last few samples, at most two for each source, are walked through.

Rejected: taking the source that lags its share most. It keeps closer to the shares, but one has to walk from the
beginning, and where ranks take turns within a lane, a source of weight 1/2 would belong to every second rank alone.
All arithmetic is IEEE double, one operation at a time, so that every machine has the same order.

Arrays are by lane, step and source, in this order: keys uint64[lanes, sources], rates float64[steps, sources], starts
int64[lanes, steps] (the number at which a step begins, 0 for the first), counts int64[lanes, steps, sources] and lags
float64[lanes, steps, sources] (how many samples of each source come before a step, and its lag then).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_in, array_out, boolean, float64, helper, int32, int64, kernel, uint64, void
from fastload.kernels.shuffling import splitmix

__all__ = ["NEVER", "fill_steps", "mix", "numbers_of", "shares_at"]

# The number of a sample that never comes: no weight is left.
NEVER = 1 << 62

_U11 = np.uint64(11)
_PER_53_BITS = 2.0**-53
_NEVER_TIME = np.inf


@helper(float64(uint64, int64, float64, float64, int64))
def _time(key: np.uint64, count: int, lag: float, rate: float, ordinal: int) -> float:
    """When sample `ordinal` of a step comes, before which the lane has had `count` of the source."""
    if rate == 0.0:
        return _NEVER_TIME
    jitter = np.float64(splitmix(key, np.uint64(count + ordinal)) >> _U11) * _PER_53_BITS
    return (np.float64(ordinal) + jitter - lag) / rate


@helper(int64(uint64, int64, float64, float64, float64, boolean))
def _count_before(key: np.uint64, count: int, lag: float, rate: float, time: float, or_at: bool) -> int:
    """How many samples of the step come before a time, or at it."""
    if rate == 0.0:
        return 0
    ordinal = max(0, int(np.floor(time * rate + lag)))
    while ordinal > 0:
        last = _time(key, count, lag, rate, ordinal - 1)
        if last < time or (or_at and last == time):
            break
        ordinal -= 1
    while True:
        following = _time(key, count, lag, rate, ordinal)
        if following > time or (following == time and not or_at):
            return ordinal
        ordinal += 1


@helper(
    int64(
        array_in(uint64),
        array_in(int64),
        array_in(float64),
        array_in(float64),
        array_out(int64),
        array_out(float64),
    )
)
def _take(
    keys: NDArray[np.uint64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
    rates: NDArray[np.float64],
    ordinals: NDArray[np.int64],
    times: NDArray[np.float64],
) -> int:
    """The source of the next number; goes on beyond it."""
    soonest = 0
    for source in range(1, times.size):
        if times[source] < times[soonest]:
            soonest = source
    ordinals[soonest] += 1
    times[soonest] = _time(keys[soonest], counts[soonest], lags[soonest], rates[soonest], ordinals[soonest])
    return soonest


@helper(
    void(
        array_in(uint64),
        array_in(int64),
        array_in(float64),
        array_in(float64),
        int64,
        array_out(int64),
        array_out(float64),
    )
)
def _seek(
    keys: NDArray[np.uint64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
    rates: NDArray[np.float64],
    within: int,
    ordinals: NDArray[np.int64],
    times: NDArray[np.float64],
) -> None:
    """Fill `ordinals` with how many samples of each source are among the first `within` numbers of a step, and `times`
    with when the next of each comes.
    """
    time, back = np.float64(within), 1.0
    for source in range(rates.size):
        if rates[source] > 0.0:
            time -= 1.0 + lags[source]
    while True:
        found = 0
        for source in range(rates.size):
            ordinals[source] = _count_before(keys[source], counts[source], lags[source], rates[source], time, False)
            found += ordinals[source]
        if found <= within:
            break
        # Only where a source that was ahead of its share has not begun: at a time as early, it counts for less than 0.
        time -= back
        back *= 2.0
    for source in range(rates.size):
        times[source] = _time(keys[source], counts[source], lags[source], rates[source], ordinals[source])
    while found < within:
        _take(keys, counts, lags, rates, ordinals, times)
        found += 1


@helper(int64(array_in(int64), int64))
def _step_at(starts: NDArray[np.int64], number: int) -> int:
    """The step that a number is in; the last of those that begin there."""
    low, high = 0, starts.size
    while high - low > 1:
        middle = (low + high) >> 1
        if starts[middle] <= number:
            low = middle
        else:
            high = middle
    return low


@kernel(
    void(
        array_in(uint64, 2),
        array_in(float64, 2),
        array_in(int64, 2),
        array_out(int64),
        array_out(float64),
        array_out(int64, 3),
        array_out(float64, 3),
    )
)
def fill_steps(
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    starts: NDArray[np.int64],
    ordinals: NDArray[np.int64],
    times: NDArray[np.float64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
) -> None:
    """Fill `counts` and `lags`. Scratch, here and below: `ordinals` and `times`, [sources]."""
    lanes, steps, sources = counts.shape
    for lane in range(lanes):
        for source in range(sources):
            counts[lane, 0, source], lags[lane, 0, source] = 0, 0.0
        for step in range(1, steps):
            length = starts[lane, step] - starts[lane, step - 1]
            _seek(keys[lane], counts[lane, step - 1], lags[lane, step - 1], rates[step - 1], length, ordinals, times)
            for source in range(sources):
                gained = np.float64(length) * rates[step - 1, source]
                gained = gained - np.float64(ordinals[source])
                counts[lane, step, source] = counts[lane, step - 1, source] + ordinals[source]
                lags[lane, step, source] = lags[lane, step - 1, source] + gained


@kernel(
    void(
        array_in(uint64, 2),
        array_in(float64, 2),
        array_in(int64, 2),
        array_in(int64, 3),
        array_in(float64, 3),
        array_in(int64),
        array_in(int64),
        array_out(float64),
        array_out(int64, 2),
    )
)
def shares_at(
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
    lanes: NDArray[np.int64],
    numbers: NDArray[np.int64],
    times: NDArray[np.float64],
    out: NDArray[np.int64],
) -> None:
    """Fill out[i, s] with how many of the first numbers[i] numbers of lanes[i] are of source s."""
    for i in range(lanes.size):
        lane = lanes[i]
        step = _step_at(starts[lane], numbers[i])
        within = numbers[i] - starts[lane, step]
        _seek(keys[lane], counts[lane, step], lags[lane, step], rates[step], within, out[i], times)
        for source in range(times.size):
            out[i, source] += counts[lane, step, source]


@kernel(
    void(
        array_in(uint64, 2),
        array_in(float64, 2),
        array_in(int64, 2),
        array_in(int64, 3),
        array_in(float64, 3),
        array_in(int64),
        array_in(int64),
        array_in(int64),
        array_out(int64),
    )
)
def numbers_of(
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
    lanes: NDArray[np.int64],
    sources: NDArray[np.int64],
    samples: NDArray[np.int64],
    out: NDArray[np.int64],
) -> None:
    """Fill out[i] with the number in lanes[i] of sample samples[i] of sources[i], or `NEVER`."""
    for i in range(lanes.size):
        lane, source = lanes[i], sources[i]
        key, step = keys[lane], rates.shape[0] - 1
        while counts[lane, step, source] > samples[i]:
            step -= 1
        count, lag, rate = counts[lane, step], lags[lane, step], rates[step]
        if rate[source] == 0.0:
            out[i] = NEVER
            continue
        ordinal = samples[i] - count[source]
        time = _time(key[source], count[source], lag[source], rate[source], ordinal)
        number = starts[lane, step] + ordinal
        for other in range(rate.size):
            if other != source:
                number += _count_before(key[other], count[other], lag[other], rate[other], time, other < source)
        out[i] = number


@kernel(
    void(
        array_in(uint64, 2),
        array_in(float64, 2),
        array_in(int64, 2),
        array_in(int64, 3),
        array_in(float64, 3),
        int64,
        array_in(int64),
        array_out(int64),
        array_out(float64),
        array_out(int32),
        array_out(int64),
    )
)
def mix(
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    lags: NDArray[np.float64],
    lane: int,
    numbers: NDArray[np.int64],
    ordinals: NDArray[np.int64],
    times: NDArray[np.float64],
    source_of: NDArray[np.int32],
    sample_of: NDArray[np.int64],
) -> None:
    """For each of `numbers` of a lane, rising: its source, and how many samples of it the lane has before."""
    steps, sources = rates.shape
    key, step, within = keys[lane], -1, 0
    count, lag, rate = counts[lane, 0], lags[lane, 0], rates[0]
    for i in range(numbers.size):
        is_new_step = step < 0 or (step + 1 < steps and numbers[i] >= starts[lane, step + 1])
        if is_new_step:
            # Views are made here alone, since each costs as much as a number.
            step = _step_at(starts[lane], numbers[i])
            count, lag, rate = counts[lane, step], lags[lane, step], rates[step]
        ahead = numbers[i] - starts[lane, step] - within
        if is_new_step or ahead > 3 * sources:
            within = numbers[i] - starts[lane, step]
            _seek(key, count, lag, rate, within, ordinals, times)
            ahead = 0
        for _ in range(ahead):
            _take(key, count, lag, rate, ordinals, times)
        source = _take(key, count, lag, rate, ordinals, times)
        within += ahead + 1
        source_of[i] = source
        sample_of[i] = count[source] + ordinals[source] - 1
