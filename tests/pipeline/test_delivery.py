"""A run gives batches in order, hands failures over, and ends whatever happens."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from fastload.errors import ServiceError
from fastload.pipeline import delivery as run_module
from fastload.pipeline.delivery import DecodePool, InlineRun, RunClosedError, ThreadedRun
from fastload.waiting import Waits
from tests.patience import PATIENCE_S
from tests.processes import until


class Feed:
    """Plan entries that are numbers; counts which were made or given up. All but the last are there at once where
    `has_next`, and each has to be waited for where not.
    """

    def __init__(self, count: int, fail_at: int | None = None, *, is_quick: bool = False) -> None:
        self.count, self.fail_at, self._is_quick = count, fail_at, is_quick
        self.given: list[int] = []
        self.finished: list[int] = []

    def entries(self):
        for number in range(self.count):
            if number == self.fail_at:
                raise RuntimeError(f"no entry {number}")
            self.given.append(number)
            yield number

    @property
    def has_next(self) -> bool:
        return self._is_quick and len(self.given) < self.count

    def done(self, entry: int) -> None:
        self.finished.append(entry)


@pytest.fixture
def pool():
    pool = DecodePool(3)
    yield pool
    pool.close()


def each(function: Callable[[int], int]) -> Callable[[Sequence[int]], Iterator[int]]:
    def make(numbers: Sequence[int]) -> Iterator[int]:
        return (function(number) for number in numbers)

    return make


def itself(number: int) -> int:
    return number


def slow_for_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return number * 10


def test_batches_come_in_order(pool: DecodePool) -> None:
    feed = Feed(50)
    run = ThreadedRun(feed, each(slow_for_even), pool, depth=6, waits=Waits())
    assert list(run) == [(number, number * 10) for number in range(50)]
    assert sorted(feed.finished) == list(range(50))
    with pytest.raises(StopIteration):
        next(run)
    run.close()


def test_the_depth_bounds_what_is_ahead(pool: DecodePool) -> None:
    feed = Feed(100)
    run = ThreadedRun(feed, each(itself), pool, depth=4, waits=Waits())
    next(run)
    deadline = time.monotonic() + PATIENCE_S
    while len(feed.given) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(feed.given) <= 6  # one delivered, four ahead, one in the feeder's hand
    run.close()
    assert set(feed.finished) >= set(feed.given[:-1])


def test_the_feeder_pauses_for_breath_only_while_it_is_ahead(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(run_module, "let_breathe", told.append)
    may_make = threading.Event()

    def wait(number: int) -> int:
        assert may_make.wait(PATIENCE_S)
        return number

    run = ThreadedRun(Feed(5), each(wait), pool, depth=3, waits=Waits())
    until(lambda: len(told) == 4)
    assert told == [True, False, True, True]  # it begins, and the line grows
    may_make.set()
    assert list(run) == [(number, number) for number in range(5)]
    assert len(told) == 6
    run.close()


def test_a_failure_comes_where_its_batch_would_have(pool: DecodePool) -> None:
    def fail_at_five(number: int) -> int:
        if number == 5:
            raise ValueError("sample 5 is broken")
        return number

    run = ThreadedRun(Feed(20), each(fail_at_five), pool, depth=8, waits=Waits())
    assert [next(run)[1] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="sample 5 is broken") as caught:
        next(run)
    assert "fail_at_five" in [entry.name for entry in caught.traceback]
    run.close()


def test_a_failure_of_the_feed_comes_after_its_entries(pool: DecodePool) -> None:
    run = ThreadedRun(Feed(20, fail_at=3), each(itself), pool, depth=8, waits=Waits())
    assert [next(run)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no entry 3"):
        next(run)
    run.close()


def test_quick_batches_are_made_together_and_slow_ones_alone() -> None:
    sizes: list[int] = []
    takes_s = [0.0]
    clock = [0.0]

    def make(numbers: Sequence[int]) -> Iterator[int]:
        sizes.append(len(numbers))
        clock[0] += takes_s[0]
        return iter(numbers)

    pool, feed = DecodePool(1), Feed(1000, is_quick=True)
    run = ThreadedRun(feed, make, pool, depth=1, waits=Waits(), now=lambda: clock[0])
    assert [next(run)[0] for _ in range(300)] == list(range(300))
    assert sizes[:3] in ([1, 2, 4], [1, 1, 2])  # the second may have been begun before the first was done
    assert max(sizes) == sizes[-1] == 64
    takes_s[0] = 1.0
    assert [next(run) for _ in range(700)] == [(number, number) for number in range(300, 1000)]
    assert sizes[-20:] == [1] * 20
    assert sorted(feed.finished) == list(range(1000))
    with pytest.raises(StopIteration):
        next(run)
    run.close()
    pool.close()


def test_of_batches_that_are_made_together_each_fails_alone(pool: DecodePool) -> None:
    broken = {5, 6, 17, 39}

    def make(number: int) -> int:
        if number in broken:
            raise ValueError(f"sample {number} is broken")
        return number

    feed = Feed(40, is_quick=True)
    run = ThreadedRun(feed, each(make), pool, depth=3, waits=Waits(), now=lambda: 0.0)
    for number in range(40):
        if number in broken:
            with pytest.raises(ValueError, match=f"sample {number} is broken"):
                next(run)
        else:
            assert next(run) == (number, number)
    assert sorted(feed.finished) == list(range(40))
    run.close()


def test_a_failure_does_not_wait_for_what_was_to_be_made_with_its_batch(pool: DecodePool) -> None:
    seen, late = threading.Event(), []

    def make(number: int) -> int:
        if number == 70:
            raise ValueError("sample 70 is broken")
        if number > 70 and not seen.wait(PATIENCE_S):
            late.append(number)
            seen.set()
        return number

    run = ThreadedRun(Feed(200, is_quick=True), each(make), pool, depth=1, waits=Waits(), now=lambda: 0.0)
    assert [next(run)[1] for _ in range(70)] == list(range(70))
    with pytest.raises(ValueError, match="sample 70 is broken"):
        next(run)
    seen.set()
    assert [next(run)[1] for _ in range(129)] == list(range(71, 200))
    assert not late
    run.close()


def test_close_does_not_wait_for_what_was_to_be_made_with_a_batch() -> None:
    began, may_end = threading.Event(), threading.Event()
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 70:
            began.set()
            may_end.wait(PATIENCE_S)
        return number

    def consume() -> None:
        with pytest.raises(RunClosedError):
            list(run)

    pool = DecodePool(1)
    run = ThreadedRun(Feed(200, is_quick=True), each(make), pool, depth=1, waits=Waits(), now=lambda: 0.0)
    consuming, closing = threading.Thread(target=consume), threading.Thread(target=run.close)
    consuming.start()
    assert began.wait(PATIENCE_S)
    closing.start()
    consuming.join()  # then it is closed, and what is being made may end
    may_end.set()
    closing.join()
    assert made[-1] == 70
    pool.close()


def test_what_came_before_a_failure_of_the_feed_is_made(pool: DecodePool) -> None:
    run = ThreadedRun(Feed(20, fail_at=13, is_quick=True), each(itself), pool, 2, Waits(), now=lambda: 0.0)
    assert [next(run)[1] for _ in range(13)] == list(range(13))
    with pytest.raises(RuntimeError, match="no entry 13"):
        next(run)
    run.close()


@pytest.mark.parametrize("threaded", [True, False])
def test_a_stop_iteration_of_the_users_is_no_end(pool: DecodePool, threaded: bool) -> None:
    def stop(number: int) -> int:
        return next(iter(()))

    run = ThreadedRun(Feed(3), each(stop), pool, 2, Waits()) if threaded else InlineRun(Feed(3), each(stop), Waits())
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(run)
    run.close()


def test_close_in_the_middle(pool: DecodePool) -> None:
    feed = Feed(1000)
    run = ThreadedRun(feed, each(slow_for_even), pool, depth=8, waits=Waits())
    next(run)
    run.close()
    run.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]
    with pytest.raises(RunClosedError):
        next(run)


def test_close_from_another_thread_is_not_the_end_of_the_epoch(pool: DecodePool) -> None:
    blocked = threading.Event()

    def block(number: int) -> int:
        blocked.wait(PATIENCE_S)
        return number

    run = ThreadedRun(Feed(10), each(block), pool, depth=8, waits=Waits())
    closing = threading.Thread(target=run.close)
    threading.Timer(0.1, closing.start).start()
    threading.Timer(0.2, blocked.set).start()
    with pytest.raises(RunClosedError, match="closed in mid-epoch"):
        next(run)
    closing.join()


def test_inline_is_the_same_without_threads() -> None:
    feed = Feed(5)
    run = InlineRun(feed, each(slow_for_even), Waits())
    before = threading.active_count()
    assert list(run) == [(number, number * 10) for number in range(5)]
    assert threading.active_count() == before
    assert feed.finished == list(range(5))


def test_inline_close() -> None:
    run = InlineRun(Feed(10), each(itself), Waits())
    next(run)
    run.close()
    run.close()
    with pytest.raises(RunClosedError):
        next(run)


def test_a_forgotten_pool_ends_its_threads() -> None:
    pool = DecodePool(2, name="forgotten")
    pool.submit(lambda: None)
    del pool
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("forgotten")])


def test_a_pool_that_was_closed_fails_the_run() -> None:
    pool = DecodePool(1)
    pool.close()
    run = ThreadedRun(Feed(10), each(itself), pool, depth=2, waits=Waits())
    with pytest.raises(ServiceError, match="threads have ended"):
        next(run)
    run.close()
