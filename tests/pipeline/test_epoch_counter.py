"""The epoch counter: one number for all copies of a data set that work together."""

import copy
import multiprocessing
import os
import pickle

import pytest

from fastload.pipeline.epoch_counter import EpochCounter


def begin_in_worker(counter: EpochCounter, base_seed: int, begins: int, answers) -> None:
    answers.put([counter.begin(base_seed, workers=3) for _ in range(begins)])


def epochs_of_workers(counter: EpochCounter, method: str, base_seed: int, begins: int = 1) -> list[list[int]]:
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    workers = [context.Process(target=begin_in_worker, args=(counter, base_seed, begins, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = [answers.get() for _ in workers]
    answers.close()
    return found


def test_each_iteration_is_the_next_epoch() -> None:
    counter = EpochCounter()
    assert [counter.begin(), counter.begin()] == [0, 1]
    counter.set(7)
    assert counter.next() == 7
    assert [counter.begin(), counter.begin()] == [7, 8]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_one_epoch_agree(method: str) -> None:
    counter = EpochCounter()
    assert epochs_of_workers(counter, method, base_seed=11) == [[0]] * 3
    assert epochs_of_workers(counter, method, base_seed=12) == [[1]] * 3
    counter.set(5)
    # Workers that stay alive begin again under the same seed.
    assert epochs_of_workers(counter, method, base_seed=13, begins=2) == [[5, 6]] * 3
    assert counter.next() == 7


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_same_seed_again_is_another_epoch() -> None:
    counter = EpochCounter()
    assert [epochs_of_workers(counter, "fork", base_seed=11) for _ in range(3)] == [[[0]] * 3, [[1]] * 3, [[2]] * 3]


def test_set_epoch_reaches_persistent_workers() -> None:
    parent = EpochCounter()
    assert parent.begin(99) == 0
    parent.set(0)
    assert parent.begin(99) == 0
    assert parent.begin(99) == 1


def test_two_loaders_over_one_data_set_do_not_mix() -> None:
    counter = EpochCounter()
    one, other = EpochCounter.__new__(EpochCounter), EpochCounter.__new__(EpochCounter)
    for twin in (one, other):
        twin._own(os.dup(counter._fd))
        twin._begun = 0
    assert counter.begin(1, workers=2) == 0
    assert one.begin(2, workers=2) == 1
    fresh = EpochCounter.__new__(EpochCounter)
    fresh._own(os.dup(counter._fd))
    fresh._begun = 0
    assert fresh.begin(1, workers=2) == 0
    assert other.begin(2, workers=2) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda counter: pickle.loads(pickle.dumps(counter))])
def test_a_copy_stands_alone(copied) -> None:
    counter = EpochCounter()
    counter.set(4)
    twin = copied(counter)
    assert twin.begin() == 4
    assert counter.next() == 4
