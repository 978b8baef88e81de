"""Which steps of a run stay; and that no step that stays ever loses what it refers to, whatever happens when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload.checkpoint import Keep, Run, attempts, dedup, retention, run, single
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.retention import Committed, expendable
from fastload.errors import ConfigError, FastloadError
from tests.checkpoint.saving import MemoryStore, Stopped

URL = "s3://b/run"

metrics = st.none() | st.integers(0, 3).map(float)
keeps = st.builds(
    Keep,
    last=st.integers(1, 4),
    every=st.sampled_from([0, 2, 3]),
    best=st.integers(0, 2),
    best_is=st.sampled_from(["lowest", "highest"]),
)


@given(
    st.lists(
        st.builds(
            Committed, st.integers(0, 30), st.integers(0, 9).map(float), st.none() | st.integers(0, 3).map(float)
        ),
        unique_by=lambda each: each.step,
        max_size=12,
    ),
    keeps,
    st.sets(st.integers(0, 30), max_size=3),
)
def test_what_may_go(steps: list[Committed], keep: Keep, under_way: set[int]) -> None:
    going = set(expendable(steps, keep, under_way))
    there = {each.step for each in steps}
    assert going <= there - under_way
    staying = there - going
    if not steps:
        return
    assert set(sorted(there)[-keep.last :]) <= staying
    assert max(each.at_s for each in steps) in {each.at_s for each in steps if each.step in staying}
    if keep.every:
        assert {step for step in there if step % keep.every == 0} <= staying
    scored = [each for each in steps if each.metric is not None]
    if keep.best and scored:
        best = (min if keep.best_is == "lowest" else max)(each.metric for each in scored)
        assert best in {each.metric for each in scored if each.step in staying}
    # No more stays than there are reasons.
    reasons = keep.last + 1 + keep.best + len(under_way & there)
    assert len([step for step in staying if not keep.every or step % keep.every]) <= reasons
    assert expendable([each for each in steps if each.step in staying], keep, under_way) == []


def test_what_is_no_rule() -> None:
    with pytest.raises(ConfigError, match=r"Keep\(last=0\): give a whole number of 1 or more, since the newest"):
        Keep(last=0)
    with pytest.raises(ConfigError, match=r"Keep\(every=-1\)"):
        Keep(every=-1)
    with pytest.raises(ConfigError, match="write lowest or highest"):
        Keep(best_is="best")  # type: ignore[arg-type]


# Whatever happens when


@dataclass(frozen=True)
class Save:
    step: int
    changed: slice  # which of the pieces
    value: int
    metric: float | None


@dataclass(frozen=True)
class Prune:
    keep: Keep
    grace_h: int


@dataclass(frozen=True)
class Remove:
    step: int


@dataclass(frozen=True)
class Wait:
    hours: int


@dataclass(frozen=True)
class Event:
    """One thing; after so many operations others happen in its midst, each whole, or where there are none it ends."""

    what: Save | Prune | Remove | Wait
    after: int | None = None
    then: tuple[Save | Prune | Remove, ...] = ()


saves = st.builds(Save, st.integers(1, 6), st.slices(4), st.integers(0, 2), metrics)
prunes = st.builds(Prune, keeps, st.sampled_from([0, 24]))
events = st.builds(
    Event,
    saves | prunes | st.builds(Wait, st.sampled_from([1, 30])),
    st.none() | st.integers(0, 40),
    st.lists(saves | prunes, max_size=3).map(tuple),
)


class World:
    """Processes that save and prune one run, in a store in memory."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.now_s = self.store.now_s = 1e6
        self.pieces = [0, 0, 0, 0]
        self.last: Save | None = None

    def happen(self, event: Event) -> None:
        count = iter(range(1 << 30))

        def before(operation: str, url: str) -> None:
            if next(count) == event.after:
                self.store.before = lambda operation, url: None
                if not event.then:
                    self.store.before = self.dead
                    raise Stopped
                for what in event.then:
                    with contextlib.suppress(FastloadError):
                        self.do(what)

        if event.after is not None:
            self.store.before = before
        try:
            self.do(event.what)
        finally:
            self.store.before = lambda operation, url: None

    @staticmethod
    def dead(operation: str, url: str) -> None:
        raise Stopped

    def do(self, what: Save | Prune | Remove | Wait) -> None:
        run = Run(URL, dedup=True)
        if isinstance(what, Wait):
            self.now_s += 3600 * what.hours
            self.store.now_s = self.now_s
        elif isinstance(what, Remove):
            retention.remove(Place.of(self.store, run.step_url(what.step)))
        elif isinstance(what, Prune):
            run = Run(URL, keep=what.keep)
            run.prune(grace_s=3600.0 * what.grace_h)
        else:
            self.pieces[what.changed] = [what.value] * len(self.pieces[what.changed])
            content = list(self.pieces)
            run.save(what.step, {"w": tensor(content), "content": content}, metric=what.metric)

    def check(self) -> set[int]:
        """All steps that are there load, as they were saved."""
        there = Run(URL).steps()
        for step in there:
            state = Run(URL).load(step=step)
            assert state["w"].equal(tensor(state["content"])), step
        return set(there)


def tensor(content: list[int]) -> torch.Tensor:
    return torch.tensor(content, dtype=torch.float32).repeat_interleave(16)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[], World]:
    made: list[World] = []

    def make() -> World:
        made.append(World())
        return made[-1]

    monkeypatch.setattr(dedup, "PIECE_BYTES", 64)
    monkeypatch.setattr(attempts, "open_store", lambda *_: made[-1].store)
    for module in (run, single):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: made[-1].now_s))
    return make


@given(st.lists(events, min_size=2, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_step_that_stays_loses_an_object(world: Callable[[], World], happening: list[Event]) -> None:
    here, before = world(), set[int]()
    for event in happening:
        with contextlib.suppress(Stopped, FastloadError):
            here.happen(event)
        after = here.check()
        pruned = any(isinstance(what, Prune) for what in (event.what, *event.then))
        assert pruned or before <= after
        assert not before or after  # the newest is never deleted
        before = after


def test_a_save_beside_one_that_lets_its_base_go(world: Callable[[], World]) -> None:
    """Step 3 refers to 1; after any number of its operations step 2 is saved, which does not, and 1 goes."""
    count = 0
    for after in range(100):
        here = world()
        here.happen(Event(Save(1, slice(4), 1, None)))
        beside = Save(2, slice(4), 2, None), Remove(1)
        here.happen(Event(Save(3, slice(1), 3, None), after, beside))  # and does not fail
        if here.check() == {1, 3}:  # it had ended before
            break
        count += 1
        assert here.check() == {2, 3}
        for _ in range(2):
            here.happen(Event(Prune(Keep(last=2), 0)))
        assert here.check() == {2, 3}
    assert count >= 15
