"""What processes are started with: each has all of it, large arrays are there once, and what is pickled is so once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastload.transport.once import Once
from tests.programs import run

LARGE = 1 << 20


class Counted:
    """Says how often it was pickled."""

    pickled = 0

    def __getstate__(self) -> dict[str, Any]:
        type(self).pickled += 1
        return {"number": 7}


def report(things: dict[str, Any], again: Any, answers: Any) -> None:
    """What a process finds, and that it may write to it."""
    array, frozen = things["array"], things["frozen"]
    found: dict[str, Any] = {
        "sums": [int(array.sum()), int(frozen.sum()), int(things["tensor"].sum()), int(things["view"].sum())],
        "same": again[0] is things["list"],
        "bytes": len(things["bytes"]),
        "number": things["counted"].number,
        "file": memory_name(array),
    }
    array += 1
    frozen += 1
    things["tensor"] += 0
    found["after"] = int(array.sum())
    answers.put(found)


def memory_name(array: Any) -> str:
    """Of the file that lies at an array's address."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return line.split()[-1]
    return ""


@pytest.mark.parametrize(("method", "has_queue"), [("spawn", True), ("forkserver", True), ("forkserver", False)])
def test_each_process_has_everything_and_large_arrays_are_written_once(method, has_queue):
    Counted.pickled = 0
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    array = np.ones((4, LARGE), np.uint8)
    frozen = np.ones(LARGE, np.uint8)
    frozen.flags.writeable = False
    shared: list[Any] = ["x"]
    things: dict[str, Any] = {
        "array": array,
        "frozen": frozen,
        "view": array[:, 1:3],
        "tensor": torch.ones(LARGE, dtype=torch.uint8),
        "list": shared,
        "bytes": b"x" * LARGE,
        "counted": Counted(),
    }
    if has_queue:
        things["queue"] = context.SimpleQueue()  # whose descriptors are of one process
    else:
        # a tensor's are too
        things["tensor"] = np.ones(LARGE, np.uint8)
    once = Once((things, (shared,)))
    count = 1 if method == "spawn" else 2  # a start takes seconds
    processes = []
    try:
        for _ in range(count):
            process = context.Process(target=report, args=(*once.parts(), answers))
            process.start()
            processes.append(process)
        size = os.fstat(once._file.fd).st_size
        found = [answers.get() for _ in processes]
    finally:
        once.close()
        for process in processes:
            process.join()
    for each in found:
        assert each["sums"] == [4 * LARGE, LARGE, LARGE, 8]
        assert each["same"]
        assert (each["bytes"], each["number"]) == (LARGE, 7)
        assert each["after"] == 8 * LARGE  # and no other process sees it
        assert "fastload-start" in each["file"] or each["file"] == "(deleted)"
    assert Counted.pickled == (count if has_queue else 1)
    arrays = 5 * LARGE if has_queue else 6 * LARGE
    pickles = count * LARGE if has_queue else LARGE  # each has the bytes
    assert arrays + pickles <= size < arrays + pickles + LARGE // 2
    assert array.sum() == 4 * LARGE


def test_what_is_beside_goes_to_each_process_by_itself():
    context = multiprocessing.get_context("forkserver")
    answers = context.SimpleQueue()
    once = Once(({"queue": answers, "counted": Counted()},), beside=(answers,))
    Counted.pickled = 0
    processes = [context.Process(target=answer, args=once.parts()) for _ in range(2)]
    try:
        for process in processes:
            process.start()
        assert [answers.get(), answers.get()] == [7, 7]
    finally:
        once.close()
        for process in processes:
            process.join()
    assert Counted.pickled == 1


def answer(things: dict[str, Any]) -> None:
    """Through what came beside."""
    things["queue"].put(things["counted"].number)


def test_what_cannot_be_pickled_is_an_error_where_it_is_started():
    context = multiprocessing.get_context("spawn")
    once = Once((lambda: None,))
    try:
        with pytest.raises(Exception, match="lambda"):
            context.Process(target=print, args=once.parts()).start()
    finally:
        once.close()
        once.close()
    assert multiprocessing.context.get_spawning_popen() is None


BY_NAME = """
import torch
from fastload.transport.once import Once


class Copying:
    def __init__(self):
        self.tensor = torch.ones(100_000)

    def __setstate__(self, state):  # it does not keep the shared memory that its tensor came in
        self.tensor = state["tensor"].clone()


def check(copying):
    assert copying.tensor.sum() == 100_000


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastload.transport.once"])
    once = Once((Copying(),))
    for _ in range(3):  # one after another, so that each has released it before the next looks
        process = context.Process(target=check, args=once.parts())
        process.start()
        process.join()
        assert process.exitcode == 0
    once.close()
"""


def test_tensors_that_are_shared_by_name_are_there_for_the_last_process_too(tmp_path):
    """torch counts the references to such a name, and removes the file when all are released."""
    script = tmp_path / "by_name.py"
    script.write_text(BY_NAME)
    run(BY_NAME, path=script)
