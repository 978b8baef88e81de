"""Nodes that tell each other what they count, over a real store of torch.distributed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as distributed

from fastload.errors import ServiceError, ShardError
from fastload.pipeline import counts as counts_module
from fastload.pipeline.counts import Exchange, ExchangedCounts
from fastload.waiting import Waits
from tests.patience import PATIENCE_S

COUNTS = np.array([3, 0, 4, 1, 5, 9, 2, 6], np.int64)


class Node:
    """A node's source, whose shards are a list of counts; `broken` ones cannot be indexed."""

    def __init__(self, broken: int | None = None) -> None:
        self._counts = np.full(len(COUNTS), -1, np.int64)
        self._broken = broken
        self.indexed: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_interrupted = False
        self.shards = self.consumer = self
        self.manifest = self
        self.objects = [self] * len(COUNTS)
        self.url = "s3://bucket/x.tar"
        self.sample_count = 0

    def counts_of(self, object_nos: Any) -> Any:
        return self._counts[object_nos]

    def counts_in_memory(self) -> tuple[Any, Any]:
        known = np.flatnonzero(self._counts >= 0).astype(np.int32)
        return known, self._counts[known]

    def learn_counts(self, object_nos: Any, counts: Any) -> None:
        self._counts[object_nos] = counts

    def index(self, consumer: Any, numbers: list[int]) -> list[Any]:
        assert self.gate.wait(PATIENCE_S)
        if self._broken in numbers:
            raise ShardError(f"shard {self._broken} is no tar")
        self.indexed += numbers
        return [type("Index", (), {"sample_count": COUNTS[number]}) for number in numbers]

    def open(self) -> Any:
        return self

    def give_back(self, session: Any) -> None:
        pass

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        self.gate.set()
        yield


def nos(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


NONE = nos()


class Impatient:
    """A consumer that is interrupted when it is asked for the third time."""

    def __init__(self) -> None:
        self._looks = itertools.count(1)

    @property
    def is_interrupted(self) -> bool:
        return next(self._looks) >= 3


READS_NOTHING: Any = SimpleNamespace(is_interrupted=False)  # a consumer that must not be read with


@pytest.fixture
def store() -> Any:
    return distributed.PrefixStore("test", distributed.HashStore())


@contextmanager
def exchange(node: Node, store: Any, own: Any, common: Any = NONE, serves: bool = True) -> Iterator[Exchange]:
    made = Exchange(node, store, own, common, serves=serves)  # type: ignore[arg-type]
    made.open()
    try:
        yield made
    finally:
        made.close()


def test_a_count_comes_from_whoever_opens_the_shard(store: Any) -> None:
    a, b = Node(), Node()
    with exchange(a, store, nos(0, 1, 2, 3)) as of_a, exchange(b, store, nos(4, 5, 6, 7), serves=False) as of_b:
        of_a.counted(nos(0, 1), COUNTS[:2])
        found, counts = of_b.ask(nos(1, 2), READS_NOTHING)
        assert (found.tolist(), counts.tolist()) == ([1], [0])
        assert b.counts_in_memory()[0].tolist() == [0, 1]  # all that was said is remembered
        assert of_b.ask(nos(0), READS_NOTHING)[1].tolist() == [3]  # also where it was heard before
    assert a.indexed == b.indexed == []


def test_a_count_that_nobody_has_is_asked_for_and_counted_by_its_node(store: Any) -> None:
    a, b = Node(), Node()
    with exchange(a, store, nos(0, 1, 2, 3)), exchange(b, store, nos(4, 5, 6, 7)) as of_b:
        known: dict[int, int] = {}
        while len(known) < 4:
            found, counts = of_b.ask(nos(*(n for n in range(4) if n not in known)), READS_NOTHING)
            known.update(zip(found.tolist(), counts.tolist(), strict=True))
    assert known == dict(enumerate(COUNTS[:4].tolist()))
    assert sorted(a.indexed) == [0, 1, 2, 3]
    assert b.indexed == []


def test_what_a_node_knew_before_reaches_the_others_when_it_begins(store: Any) -> None:
    a, b = Node(), Node()
    a.learn_counts(nos(0, 2, 5), COUNTS[[0, 2, 5]])
    with exchange(a, store, nos(0, 1, 2), common=nos(0)) as of_a, exchange(b, store, nos(5)) as of_b:
        assert of_a.known()[0].tolist() == [0, 2, 5]
        of_a.known()
        assert of_b.ask(nos(2), READS_NOTHING)[1].tolist() == [4]
        # 0 was common knowledge, and 5 is not its to tell.
        assert b.counts_in_memory()[0].tolist() == [2]
        assert store.add("counts", 0) == 1


def test_what_keeps_a_node_from_counting_reaches_whoever_asks(store: Any) -> None:
    a, b = Node(broken=1), Node()
    with exchange(a, store, nos(0, 1)), exchange(b, store, nos(2)) as of_b:
        for _ in range(2):  # asking again has it tried again
            with pytest.raises(ShardError, match="shard 1 is no tar"):
                of_b.ask(nos(1), READS_NOTHING)
        assert of_b.ask(nos(0), READS_NOTHING)[1].tolist() == [3]


def test_a_failure_is_forgotten_by_all_once_the_shard_was_counted(store: Any) -> None:
    a, b, c = Node(broken=1), Node(), Node()
    with exchange(a, store, nos(0, 1)), exchange(b, store, nos(2)) as of_b, exchange(c, store, nos(3)) as of_c:
        with pytest.raises(ShardError):
            of_b.ask(nos(1), READS_NOTHING)
        a._broken = None
        assert of_b.ask(nos(1), READS_NOTHING)[1].tolist() == [0]
        assert of_c.ask(nos(1), READS_NOTHING)[1].tolist() == [0]  # which hears of both at once


def test_whatever_keeps_a_node_from_counting_is_said(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Node(), Node()
    monkeypatch.setattr(a, "open", lambda: (_ for _ in ()).throw(OSError(28, "no space left")))
    said = pytest.raises(ServiceError, match=r"OSError.*no space left")
    with exchange(a, store, nos(0)), exchange(b, store, nos(1)) as of_b, said:
        of_b.ask(nos(0), READS_NOTHING)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_ends_ends_the_thread_quietly_and_whoever_asks_with_the_cure() -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise distributed.DistNetworkError("connection reset by peer")

    with exchange(Node(), Gone(), nos(0)) as ours:
        with pytest.raises(ServiceError, match=r"store of torch.distributed ended .*barrier\(\)"):
            ours.ask(nos(1), READS_NOTHING)
        assert ours._thread is not None
        ours._thread.join(PATIENCE_S)
        assert not ours._thread.is_alive()


def test_the_thread_ends_once_all_is_told(store: Any) -> None:
    with exchange(Node(), store, nos(0, 1), common=nos(1)) as ours:
        thread = ours._thread
        assert thread is not None
        ours.counted(nos(0), COUNTS[:1])
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        ours.close()
        ours.open()
        assert ours._thread is thread


def test_a_record_that_is_never_written_keeps_nobody_waiting(store: Any) -> None:
    a, b = Node(), Node()
    with exchange(a, store, nos(0)) as of_a, exchange(b, store, nos(1)) as of_b:
        of_a.counted(nos(0), COUNTS[:1])
        store.add("counts", 1)  # somebody died after this
        assert of_b.ask(nos(0), READS_NOTHING)[1].tolist() == [3]
        with pytest.raises(ServiceError, match="was closed while it waited"):
            of_b.ask(nos(1), Impatient())  # type: ignore[arg-type]


def test_closing_ends_whoever_asks_and_whoever_counts(store: Any) -> None:
    a, b = Node(), Node()
    a.gate.clear()
    of_a, of_b = (Exchange(node, store, own, nos(), serves=True) for node, own in ((a, nos(0)), (b, nos(1))))  # type: ignore[arg-type]
    of_a.open()
    of_b.open()
    failures = []
    consumer: Any = SimpleNamespace(is_interrupted=False)
    passes = ExchangedCounts(of_b, consumer, Waits())

    def ask() -> None:
        try:
            passes.ask(nos(0))
        except ServiceError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while of_a._attached is None:  # until it counts
        time.sleep(0.01)
    consumer.is_interrupted = True
    asking.join(PATIENCE_S)
    assert len(failures) == 1
    of_a.close()
    of_b.close()
    of_b.open()
    of_a.open()
    assert of_b.ask(nos(0), READS_NOTHING)[1].tolist() == [3]
    of_a.close()
    of_b.close()


def test_whoever_gets_no_answer_counts_for_himself(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts_module, "_COUNT_OURSELVES_AFTER_S", 0.2)
    b, c = Node(), Node()
    with exchange(b, store, nos(1)) as of_b, exchange(c, store, nos(2)) as of_c:  # the node that has 0 is not there
        assert of_b.ask(nos(0), b)[1].tolist() == [3]
        assert b.indexed == [0]
        assert of_c.ask(nos(0), READS_NOTHING)[1].tolist() == [3]  # and hears of it
        monkeypatch.setattr(b, "_broken", 3)
        with pytest.raises(ShardError, match="shard 3 is no tar"):
            of_b.ask(nos(3), b)
