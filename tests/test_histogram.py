"""Quantiles against those of a sorted list, and what is shown to metrics."""

from hypothesis import given
from hypothesis import strategies as st

from fastload.timing.histogram import BOUNDS_S, Histogram

DURATIONS = st.lists(st.floats(2e-5, 5000.0), min_size=1, max_size=80)


def histogram_of(durations: list[float]) -> Histogram:
    histogram = Histogram()
    for seconds in durations:
        histogram.add(seconds)
    return histogram


@given(durations=DURATIONS, share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_within_a_bucket_of_the_true_one(durations: list[float], share: float) -> None:
    ordered = sorted(durations)
    true = ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
    found = histogram_of(durations).quantile(share)
    assert true / 1.5 <= found <= min(true * 1.5, ordered[-1]) * (1 + 1e-9)


@given(durations=DURATIONS, zeros=st.integers(0, 100))
def test_what_took_no_time_is_counted_below(durations: list[float], zeros: int) -> None:
    histogram = histogram_of(durations)
    with_zeros = [0.0] * zeros + durations
    assert histogram.cumulative(zeros) == [sum(each <= bound for each in with_zeros) for bound in BOUNDS_S]
    assert (histogram.quantile(0.5, zeros) == 0.0) == (zeros >= len(durations))
    assert histogram.quantile(1.0, zeros) == max(durations)


def test_nothing_and_the_largest() -> None:
    assert Histogram().quantile(0.99) == 0.0
    assert Histogram().cumulative() == [0] * len(BOUNDS_S)
    beyond = histogram_of([1e5, 1e-9])
    assert (beyond.quantile(1.0), beyond.max_s, beyond.count, beyond.sum_s) == (1e5, 1e5, 2, 1e5 + 1e-9)
