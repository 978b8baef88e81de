"""CPU-seconds, memory and page cache as /proc has them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from fastload.bench import measure
from tests.processes import is_running

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"
HOLD = "import sys\ndata = bytearray(64 << 20)\nprint('ready', flush=True)\nsys.stdin.read()\n"


def test_the_cpu_seconds_of_children_that_have_ended_are_counted_once() -> None:
    before = measure.cpu_s([os.getpid()])
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert 0.25 <= measure.cpu_s([os.getpid()]) - before <= 5


def test_waits_and_pages_that_are_touched_are_counted_also_of_others() -> None:
    code = (
        "import time\nfor _ in range(300): time.sleep(1e-4)\ndata = bytearray(32 << 20)\nprint(flush=True)\ninput()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before = measure.wakeups([os.getpid()]), measure.page_faults([os.getpid()])
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert measure.wakeups([child.pid]) >= 300
        assert measure.page_faults([child.pid]) * mmap.PAGESIZE >= 32 << 20
        assert measure.wakeups([os.getpid()]) >= before[0] + 300  # a child is a part of the tree
        assert measure.page_faults([os.getpid()]) >= before[1] + measure.page_faults([child.pid])
        child.communicate(b"\n")


def test_a_tree_has_each_process_once() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = measure.descendants([os.getpid(), child.pid])
        assert child.pid in found
        assert len(found) == len(set(found))
        child.communicate(b"\n")


def test_memory_counts_anonymous_and_shared_pages() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 64 << 20 <= measure.memory_bytes([child.pid]) < 128 << 20
        child.communicate(b"")
    before = measure.memory_bytes([os.getpid()])
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 32 << 20)
    with mmap.mmap(fd, 32 << 20) as shared:
        shared.write(b"x" * (32 << 20))
        assert measure.memory_bytes([os.getpid()]) - before >= 30 << 20
    os.close(fd)


def test_peak_memory_is_that_of_the_block() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with measure.PeakMemory(lambda: [child.pid], every_s=0.01) as memory:
            while not memory.peak_bytes:
                pass
        child.communicate(b"")
    assert memory.peak_bytes >= 64 << 20


def test_the_page_cache_is_dropped_and_the_disk_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    path.parent.mkdir()
    path.write_bytes(os.urandom(1_000_001))
    measure.drop_page_cache([tmp_path])
    assert path.stat().st_size == 1_000_001
    assert measure.disk_bytes_per_s(tmp_path, threads=2) > 0


def test_the_median() -> None:
    assert measure.median([3.0, 1.0, 2.0]) == 2.0


def test_processes_that_spin_end_with_the_block() -> None:
    before = set(measure.descendants([os.getpid()]))
    with measure.spinning(2):
        pids = set(measure.descendants([os.getpid()])) - before
        assert len(pids) == 2
    assert not any(map(is_running, pids))
