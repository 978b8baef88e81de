"""Fixtures for all tests: a real S3 server, a bucket of one's own, and the proof that nothing is left
behind.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat
from multiprocessing import forkserver
from pathlib import Path

import obstore
import pytest
from hypothesis import settings

from fastload.config import cpu_count
from fastload.demo.weed import REGION, WeedServer
from fastload.errors import StoreError
from fastload.store.options import StoreOptions
from tests import zygote

# For child processes too: arithmetic in one thread each. Several test processes run on as many cores, and threads of
# torch's that wait for each other there burn what the others could use.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Set for the whole run, child processes included: a cache service ends with its last consumer.
os.environ["FASTLOAD_IDLE_S"] = "0"

# All tests try the same few cases everywhere, so that what passes for one passes for all;
# `--hypothesis-profile=default` (as `tests.plan.many` has it) and `make thorough` look for others.
settings.register_profile("repeatable", max_examples=30, derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", max_examples=2000, database=None, print_blob=True, deadline=None)
settings.load_profile("repeatable")

# Where nothing may be written beside the sources, each of a thousand processes would compile them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A process of the fork server has nothing of its parent's, like one that is spawned, and has all of this imported from
# the start: most tests of that take this way. Spawned ones, which take seconds, are where the way itself matters.
multiprocessing.set_forkserver_preload(["tests.preloaded"])

# Whoever runs the tests in the background may have had SIGINT ignored, and children that tests interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long things may take to end that nobody waits for: a service after its last consumer, an idle
# connection.
_GRACE_S = 60.0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: tests wait half of their time, so that there is work for two more than there are cores."""
    return min(6, cpu_count() + 2)


_bucket_numbers = count()
_BUCKETS_AT_ONCE = 16
# Processes that live as long as the run, whichever test asked for them first.
_lasting: set[int] = set()


# Tests that take seconds, and of which `make test` tries another variant, or the same at another level.
_THOROUGH = (
    "bench/test_chaos.py::test_a_minute_of_trouble",
    "bench/test_endurance.py::test_nothing_grows_with_epochs[inline]",
    "bench/test_endurance.py::test_nothing_grows_with_epochs[side]",
    "bench/test_endurance.py::test_nothing_grows_with_epochs[thread]",
    "bench/test_endurance.py::test_nothing_grows_with_epochs[torch]",
    "benchmark/test_own.py::test_both_loaders_stand_side_by_side",
    "benchmark/test_peers.py::test_a_loader_gives_each_sample_once[torch]",
    "cli/test_cache.py::test_evicting[alone]",
    "cli/test_cache.py::test_verifying[alone]",
    "cli/test_cache.py::test_where_there_is_no_cache_none_is_made",
    "cli/test_cache.py::test_without_a_catalog_chunks_are_unknown[True]",
    "checkpoint/test_commit.py::test_a_crash_after_each_step_beside_another_writer[7]",
    "client/test_consumer.py::test_a_second_service_run_finds_the_disk[auto]",
    "client/test_consumer.py::test_any_arena_will_do[2]",
    "client/test_consumer.py::test_indexes_are_kept[auto]",
    "daemon/test_daemon.py::test_jobs_are_listed_shown_cancelled_and_tried_again",
    "daemon/test_daemon.py::test_one_that_is_wrong_does_not_hold_up_the_others",
    "demo/test_train.py::test_a_signal_leaves_nothing[15]",
    "demo/test_train.py::test_the_second_epoch_fetches_nothing_and_the_network_learns",
    "files/test_history.py::test_a_cache_is_warmed_with_what_a_run_read",
    "files/test_history.py::test_clearing_leaves_history_unless_told",
    "files/test_processes.py::test_worker_processes[spawn]",
    "formats/test_fuzz.py::test_a_little_fuzzing[fuzz_records-bounds-50]",
    "formats/test_fuzz.py::test_a_little_fuzzing[fuzz_tar-bounds-50]",
    "formats/test_fuzz.py::test_checked_indexes_are_checked",
    "formats/test_tokens.py::test_documents_are_read_from_pieces[long tails-",
    "formats/test_tokens.py::test_ranks_share_a_file_in_pieces[long tails-",
    "jobs/test_examples.py::test_one_after_the_other_in_one_folder",
    "jobs/test_nodes.py::test_nodes_that_do_not_divide_the_partitions_fetch_few_of_them",
    "jobs/test_nodes.py::test_uneven_partitions_cost_little_of_the_others",
    "kernels/test_compile.py::test_a_first_batch_out_of_a_folder_that_was_filled_before",
    "kernels/test_plain.py::test_kernels_compiled_the_plain_way_do_the_same",
    "native/test_install.py::test_an_editable_install",
    "native/test_install.py::test_pip_install_of_what_is_released_as_source",
    "simulate/test_runs.py::test_few_answers_that_hang_cost_a_third_of_what_they_would_or_less[far]",
    "test_cache_policy.py::test_half_of_it_is_fetched_again_and_the_order_is_the_same",
    "test_kill.py::test_the_service_is_killed_in_mid_epoch[2]",
    "test_loader.py::test_resume_at_the_exact_next_sample[1-0]",
    "test_loader.py::test_resume_at_the_exact_next_sample[5-2]",
    "test_pinned.py::test_a_clock_that_was_set_back_ends_no_pin_early_and_none_for_ever",
    "test_torch_workers.py::test_epochs_advance_in_workers[forkserver]",
    "test_torch_workers.py::test_every_sample_once_and_each_byte_fetched_once[spawn]",
    "test_warm_options.py::test_a_dry_run_says_what_would_be_fetched",
    "test_warm_options.py::test_a_signal_before_anything_was_listed_says_so",
    "test_warm_options.py::test_a_signal_ends_it_with_a_word_on_what_is_held[15-143]",
    "test_warm_options.py::test_the_old_flags_still_work",
    "test_warm_options.py::test_what_a_run_read_can_be_looked_at_too",
    "test_warm_options.py::test_a_job_file_may_hold_one_table_or_several",
    "test_warm_options.py::test_what_is_pinned_stays_through_epochs_of_another_job",
    "test_why_slow.py::test_large_images[process-",
    "test_why_slow.py::test_large_images[thread-",
    "test_why_slow.py::test_slow_functions[side-",
    "test_why_slow.py::test_slow_functions[thread-",
    "torchloader/test_processes.py::test_batches_are_those_that_torch_gives[spawn]",
    "torchloader/test_processes.py::test_nothing_is_left_when_the_trainer_is_killed[spawn]",
    "transport/test_once.py::test_each_process_has_everything_and_large_arrays_are_written_once[spawn-True]",
    "transport/test_queue.py::test_each_senders_objects_come_in_order_and_whole[processes1-0]",
    "transport/test_queue.py::test_senders_that_end_do_not_wait_for_a_reader_that_was_killed[spawn]",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long are for `make thorough`: those with the marker, and those of the list."""
    thorough = pytest.mark.thorough
    skip = pytest.mark.skip(reason="`make thorough` runs it: it takes a minute")
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(_THOROUGH):
            item.add_marker(thorough)
        if "FASTLOAD_THOROUGH" not in os.environ and item.get_closest_marker("thorough"):
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """Collections of this module's tests leave out what was there before, modules above all: a look at all that torch
    and numba consist of takes a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def services_are_forked() -> Iterator[None]:
    """Those that processes of the tests start, but for tests with `real_start`."""
    zygote.install()
    with zygote.running() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv(zygote.VARIABLE, address)
        yield


@pytest.fixture
def real_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services are started as users' jobs start them."""
    monkeypatch.delenv(zygote.VARIABLE)


@pytest.fixture(scope="session")
def weed() -> Iterator[WeedServer]:
    """A real S3 server, one for the whole run."""
    directory = Path(tempfile.mkdtemp(prefix="fastload-weed-"))
    try:
        with WeedServer(directory) as server:
            _note(server)
            yield server
            # Nobody needs its data. In good order it takes two seconds to end, and up to fifteen where a client has
            # left in the middle of an object.
            os.kill(server.pid, signal.SIGKILL)
    finally:
        shutil.rmtree(directory)


def _note(weed: WeedServer) -> None:
    """It has been started, and stays."""
    assert weed.pid is not None
    _lasting.add(weed.pid)
    _start_fork_server(weed)


def _start_fork_server(weed: WeedServer) -> None:
    """Its processes have the environment that it was started in, where spawned ones have their parent's: let that lead
    to our store, whichever test is the first to need one.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # one of before, if any
    with pytest.MonkeyPatch.context() as patch:
        _lead_to(weed, patch)
        forkserver.ensure_running()


def _lead_to(weed: WeedServer, patch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            patch.delenv(name)
    for name, value in weed.environment().items():
        patch.setenv(name, value)


@pytest.fixture(scope="session")
def bucket_names(weed: WeedServer) -> Iterator[str]:
    """Buckets that hold nothing and have held something: the first object in a new one takes the server a quarter of a
    second, and in sixteen at once not even twice that.
    """

    def prepared() -> Iterator[str]:
        while True:
            names = [f"test-{next(_bucket_numbers)}" for _ in range(_BUCKETS_AT_ONCE)]
            try:
                with ThreadPoolExecutor(len(names)) as pool:
                    list(pool.map(_prepare, repeat(weed), names))
            except (OSError, StoreError, obstore.exceptions.BaseError) as error:
                # A server that had no core for long may answer nothing but 500 from then on: a new one is better.
                print(f"the S3 server is started again: {error}", file=sys.stderr)
                weed.stop()
                weed.start()
                _note(weed)
                continue
            yield from names

    return prepared()


def _prepare(weed: WeedServer, bucket: str) -> None:
    weed.make_bucket(bucket)
    weed.put(f"s3://{bucket}/first", b"x")
    weed.delete(f"s3://{bucket}/first")


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test's own: empty at first, and the environment points to its server."""

    server: WeedServer
    name: str

    @property
    def url(self) -> str:
        """`s3://bucket`, no slash at the end."""
        return f"s3://{self.name}"

    @property
    def options(self) -> StoreOptions:
        """As the owner."""
        return StoreOptions(
            endpoint_url=self.server.endpoint_url,
            access_key_id=self.server.access_key_id,
            secret_access_key=self.server.secret_access_key,
            region=REGION,
        )

    @property
    def denied_options(self) -> StoreOptions:
        """As somebody whom the server knows and who may do nothing."""
        return StoreOptions(
            endpoint_url=self.server.endpoint_url,
            access_key_id=self.server.denied_access_key_id,
            secret_access_key=self.server.denied_secret_access_key,
            region=REGION,
        )

    def put(self, key: str, data: bytes) -> str:
        """Store an object; gives its URL."""
        url = f"{self.url}/{key}"
        self.server.put(url, data)
        return url

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.server.delete(f"{self.url}/{key}")


@pytest.fixture
def s3(weed: WeedServer, bucket_names: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket on the real server, found through plain AWS_* variables too."""
    _lead_to(weed, monkeypatch)
    return Bucket(weed, next(bucket_names))


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """After every test: no new thread, process, socket, memfd, open file of the test or temp file."""
    there = _process_ids()
    before = _leavings(tmp_path, there)
    yield
    deadline = time.monotonic() + _GRACE_S
    while left := _leavings(tmp_path, there) - before:
        gc.collect()  # an error's traceback may hold what the test let go of
        multiprocessing.active_children()  # waits for those that have ended
        if time.monotonic() > deadline:
            pytest.fail("left behind:\n" + "\n".join(sorted(left)))
        time.sleep(0.02)


def _leavings(tmp_path: Path, there: set[str]) -> set[str]:
    found = {f"thread {thread.name} ({thread.ident})" for thread in threading.enumerate()}
    found |= _processes(tmp_path, there) | _descriptors(tmp_path)
    found |= {f"temp file {path}" for path in tmp_path.rglob(".tmp-*")}
    return found


def _process_ids() -> set[str]:
    return {name for name in os.listdir("/proc") if name.isdigit()}


def _processes(tmp_path: Path, there: set[str]) -> set[str]:
    """Children of ours, and processes in sessions of their own that work in the test's directory; none of those that
    were `there` before.
    """
    found = set()
    for number in _process_ids() - there:
        folder = Path("/proc") / number
        if int(number) in _lasting:
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        # multiprocessing keeps these two for the life of the process.
        if "resource_tracker" in command or "forkserver" in command:
            continue
        if parent == os.getpid() or str(tmp_path) in command:
            found.add(f"process {number}: {command[:200]}")
    return found


def _descriptors(tmp_path: Path) -> set[str]:
    """Descriptors whose being open means that somebody forgot them; eventfds and pipes of libraries are
    not.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            mode = os.stat(f"/proc/self/fd/{name}").st_mode
        except FileNotFoundError:  # the listing's own, or closed by another thread
            continue
        if stat.S_ISSOCK(mode) or re.match(r"/memfd:", target) or target.startswith(str(tmp_path)):
            found.add(f"descriptor {name} -> {target}")
    return found
