"""Worker processes for the user's Python: they make batches of bytes that were gathered in the trainer's process.

A trainer's threads share one interpreter lock with every Python function that runs in them, so the user's functions run
elsewhere. Only the last step moves: cursor, windows, leases and the cache's memory stay in the trainer's process, whose
threads gather a batch's bytes into memory shared with a worker, hand them over, and wait for the batch. So order,
resume, counts between nodes and everything else that is promised of a run hold with workers as they do with threads,
and a worker that is killed holds nothing that others wait for.

A *channel* is a connection to one thread of a worker. `channels` is how many batches one worker makes at a time: one,
where there are several processes; all, where one process makes everything that the trainer's threads would ("side").

A worker ends when the trainer's end of a channel is closed, or with the trainer's process, however that ended, and
whatever a function is doing meanwhile. It seeds the generators of Python, numpy and torch before it calls the user's
functions (see `finish`), leaves Ctrl-C to the trainer, and gives torch one thread, as torch's own workers do.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import queue
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data._utils import worker as torch_worker

from fastload import callers
from fastload.errors import ConfigError, WaitTimeoutError, WorkerError
from fastload.lifecycle import Ending, held_while_forking
from fastload.pipeline.finish import Finish, GatheredBatch, Reseed, reseed_all
from fastload.pipeline.gather import SharedMemory
from fastload.timing import activity
from fastload.timing.activity import Account, Cause, Waiting
from fastload.transport import Link, LinkClosedError, SharedPool
from fastload.transport.pickling import dump_apart
from fastload.transport.worker_process import (
    HOW_TO_SEND,
    freeze_existing_objects,
    how_it_ended,
    is_unsendable,
    keep_freed_memory,
)

# Free memory that each end of a channel keeps for batches to come.
_RETAINED_BYTES = 256 << 20
# How long a worker may take to end before it gets a signal.
_END_S = 5.0
# How often a wait for a worker checks whether it was interrupted, and a worker whether its trainer lives.
_LOOK_UP_MS = 500

# What a worker does of what makes a batch. What else its trainer waits for is the way there and back.
_OF_WORKERS: tuple[Cause, ...] = ("decode", "map", "collate")

# Held while a worker is started. A process that another thread forks meanwhile would inherit ends of connections
# that it does not know of; with them held open, this worker's death would go unnoticed.
_starting = held_while_forking(threading.RLock())


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How batches are made: by `processes` workers, `channels` at a time in each.

    `init` is called with a worker's number when it starts. A batch that takes longer than `timeout_s`, if that is not
    0, is an error. `dataset` is what the user's functions find in `get_worker_info()`: a copy, which makes no batch.
    """

    finish: Finish
    processes: int
    channels: int
    init: Callable[[int], None] | None = None
    context: BaseContext | None = None
    timeout_s: float = 0.0
    dataset: Any = None


class Workers:
    """Processes that make batches. Thread-safe, for as many threads as there are channels in all."""

    def __init__(self, options: WorkerOptions) -> None:
        """Start them. `ConfigError` where the user's functions cannot be pickled, and have to be."""
        self.options = options
        self._idle: queue.SimpleQueue[_Channel] = queue.SimpleQueue()
        self._channels: list[_Channel] = []
        self._processes: list[BaseProcess] = []
        self._interrupting = threading.Lock()
        self._interruptions = 0
        # At exit `multiprocessing` ends them.
        self._ending = Ending(self, _end, self._channels, self._processes, waits=True, at_exit=False)
        try:
            for number in range(options.processes):
                with _starting:
                    self._start(number)
        except BaseException:
            self.close()
            raise
        for channel in self._channels:
            self._idle.put(channel)

    @property
    def is_usable(self) -> bool:
        """Whether all of them live, and belong to this process."""
        ending = self._ending
        return ending.is_due and not ending.is_inherited and not any(channel.is_broken for channel in self._channels)

    def lend(self) -> contextlib.AbstractContextManager[_Channel]:
        """A channel for the length of a `with` block; there is one for each thread."""
        return self._lent()

    @contextlib.contextmanager
    def _lent(self) -> Iterator[_Channel]:
        channel = self._idle.get()
        try:
            yield channel
        finally:
            self._idle.put(channel)

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """While it is entered, a worker that does not come to an end with its batch soon is killed."""
        with self._interrupting:
            self._interruptions += 1
            if self._interruptions == 1:
                self._give_up_at(time.monotonic() + _END_S)
        try:
            yield
        finally:
            with self._interrupting:
                self._interruptions -= 1
                if not self._interruptions:  # others may be waiting still for what they have interrupted
                    self._give_up_at(None)

    def _give_up_at(self, when: float | None) -> None:
        for channel in self._channels:
            channel.give_up_at = when

    def close(self) -> None:
        """End them, and wait for that. May be called twice."""
        self._ending()

    def _start(self, number: int) -> None:
        options = self.options
        context = options.context or multiprocessing.get_context()
        pairs = [socket.socketpair() for _ in range(options.channels)]
        mine, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        # What a fork hands down besides is not the worker's to hold: others' ends would never seem closed.
        others = [*mine, *(channel.sock for channel in self._channels)] if context.get_start_method() == "fork" else []
        try:
            process = context.Process(  # type: ignore[attr-defined]  # the contexts' common base does not declare it
                target=_work,
                args=(theirs, others, options.finish, (number, options.processes), options.init, options.dataset),
                name=f"fastload-worker-{number}",
                daemon=True,
            )
            process.start()
        except BaseException as error:
            for sock in mine:
                sock.close()
            if is_unsendable(error):
                raise ConfigError(f"functions cannot be sent to the loader's workers: {error}; {HOW_TO_SEND}") from None
            raise
        finally:
            for sock in theirs:
                sock.close()
        self._processes.append(process)
        self._channels += [_Channel(sock, process, options.timeout_s) for sock in mine]


class _Did(NamedTuple):
    """What a worker did for an answer: seconds by cause, processor time of functions, samples that filters left out."""

    seconds: dict[str, float]
    map_cpu_s: float
    filtered: int


class _Channel:
    """One of a worker's threads, as the trainer sees it. `memory` is for the bytes that it is sent."""

    def __init__(self, sock: socket.socket, process: BaseProcess, timeout_s: float) -> None:
        self.sock, self._process, self._timeout_s = sock, process, timeout_s
        self._pid = process.pid  # a process that was closed does not say
        self._link = Link(sock, SharedPool(_RETAINED_BYTES))
        self.memory = SharedMemory(self._link.pool)
        self.is_broken = self._is_out_of_step = self._is_closed = False
        self.give_up_at: float | None = None
        self._mostly: Cause = "decode"  # what the worker did for the last answer
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(process.sentinel, select.POLLIN)

    def call(self, gathered: list[GatheredBatch]) -> Iterator[Any]:
        """What the worker makes of each. Raises what it raised there, or `WorkerError` where it has died.

        This thread's account books what the worker did meanwhile, as it says with its answer.
        """
        account = activity.current()
        before = account.switch(self._mostly)
        try:
            answers, did = self._asked(gathered)
            account.divide(did.seconds, "transfer")
            account.map_cpu_s += did.map_cpu_s
            account.filtered += did.filtered
            self._mostly = max(_OF_WORKERS, key=lambda cause: did.seconds.get(cause, 0.0))
        finally:
            account.switch(before)
        for is_made, made in answers:
            if not is_made:
                raise _rebuilt(*made)
            yield made

    def _asked(self, gathered: list[GatheredBatch]) -> tuple[list[tuple[bool, Any]], _Did]:
        if self._is_out_of_step:
            raise WorkerError(f"worker process {self._pid} of the loader failed before; iterate anew, with another")
        try:
            self._link.send(gathered)
            self._wait()
            return self._link.receive()  # type: ignore[no-any-return]  # what `_answer` sends
        except LinkClosedError as error:
            self.is_broken = True
            raise WorkerError(self._how_it_ended()) from error
        except BaseException:
            self.is_broken = self._is_out_of_step = True  # a late answer is no answer to the next call
            raise

    def close(self) -> None:
        """Let the worker's thread end."""
        self._is_closed = True
        self._link.close()

    def _wait(self) -> None:
        began = time.monotonic()
        while not (ready := self._poll.poll(_LOOK_UP_MS)):
            now = time.monotonic()
            if self._timeout_s and now - began > self._timeout_s:
                self._process.kill()
                raise WaitTimeoutError(
                    f"gave up after timeout={self._timeout_s:g} s waiting for worker process {self._pid} to "
                    "make a batch; raise timeout, or find what it waits for"
                )
            if self.give_up_at is not None and now > self.give_up_at:
                self._process.kill()
        if self.sock.fileno() not in [fd for fd, _ in ready]:
            raise LinkClosedError("its process has ended")

    def _how_it_ended(self) -> str:
        what = f"worker process {self._pid} of the loader "
        if self._is_closed:
            return what + "was let go while it made a batch, for the loader was closed, or begun with other workers"
        self._process.join(_END_S)
        if self._process.exitcode is None:
            return what + "closed its connection, and lives; did a function of yours close descriptors?"
        return what + how_it_ended(self._process, "a function of yours")


def _end(channels: list[_Channel], processes: list[BaseProcess]) -> None:
    for channel in channels:
        channel.close()
    deadline = time.monotonic() + _END_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for stop in (BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            if process.is_alive():
                stop(process)
                process.join(_END_S)
    for process in processes:
        # A thread that starts a process reaps all that have ended, and knows their exit codes a moment later.
        deadline = time.monotonic() + _END_S
        while process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.close()


class _TracebackThereError(Exception):
    """The cause of an error that came from a worker: its traceback there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._text = text

    def __str__(self) -> str:
        return f'\n"""\n{self._text}"""'


def _rebuilt(pickled: bytes | None, name: str, message: str, text: str) -> BaseException:
    """The worker's error, or where it does not survive pickling, one that says the same."""
    error: BaseException | None = None
    if pickled is not None:
        with contextlib.suppress(Exception):  # then another error says the same
            error = pickle.loads(pickled)
    if not isinstance(error, BaseException):
        error = WorkerError(f"a worker process of the loader raised {name}, which cannot be pickled: {message}")
    if callers.is_users(error):
        callers.mark_as_users(error)  # again: the frames of its function are in the text
    error.__cause__ = _TracebackThereError(text) if text else None
    return error


# In the worker


def _work(
    socks: list[socket.socket],
    others: list[socket.socket],
    finish: Finish,
    number_of: tuple[int, int],
    init: Callable[[int], None] | None,
    dataset: Any,
) -> None:
    for sock in others:
        sock.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_trainer, args=(socks, os.getppid()), daemon=True).start()
    torch.set_num_threads(1)
    freeze_existing_objects()
    keep_freed_memory(_RETAINED_BYTES)
    number, count = number_of
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=number,
        num_workers=count,
        seed=torch.initial_seed(),
        dataset=dataset,
    )
    failure: tuple[Any, ...] | None = None
    try:
        if init is not None:
            init(number)
    except BaseException as error:  # it is the answer to every request
        failure = _packed(error)
    reseed = reseed_all if len(socks) == 1 else lambda key: None  # threads share the generators
    threads = [threading.Thread(target=_serve, args=(sock, finish, reseed, failure), daemon=True) for sock in socks[1:]]
    for thread in threads:
        thread.start()
    _serve(socks[0], finish, reseed, failure)
    for thread in threads:
        thread.join()


def _end_with_trainer(socks: list[socket.socket], forked_from: int) -> None:
    """End this process once the trainer's has ended, after whatever it is doing, or in the midst of that.

    The sentinel is not enough: processes that were forked after this one hold its other end open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    poll = select.poll()
    poll.register(parent.sentinel, select.POLLIN)
    while os.getppid() == forked_from and not poll.poll(_LOOK_UP_MS):
        pass
    for sock in socks:
        with contextlib.suppress(OSError):  # it is closed already
            sock.shutdown(socket.SHUT_RDWR)
    time.sleep(_END_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(sock: socket.socket, finish: Finish, reseed: Reseed, failure: tuple[Any, ...] | None) -> None:
    link = Link(sock, SharedPool(_RETAINED_BYTES))
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(parent.sentinel, select.POLLIN)
    account = Account(Waiting())
    with (
        contextlib.suppress(LinkClosedError),  # the trainer has closed it, or has ended
        activity.entered(account, "transfer"),
    ):
        while sock.fileno() in [fd for fd, _ in poll.poll()]:
            _answer(link, finish, reseed, failure, account)
    link.close()


def _answer(link: Link, finish: Finish, reseed: Reseed, failure: tuple[Any, ...] | None, account: Account) -> None:
    gathered = link.receive()
    before, cpu_before_s, account.filtered = dict(account.seconds), account.map_cpu_s, 0
    answers: list[tuple[bool, Any]] = []
    try:
        if failure is None:
            for each in gathered:
                answers.append((True, finish(each, link.pool, reseed)))
        else:
            answers.append((False, failure))
    except BaseException as error:  # of the user's function
        answers.append((False, _packed(error)))
    account.switch("transfer")
    took = {cause: seconds - before[cause] for cause, seconds in account.seconds.items()}
    seconds: dict[str, float] = {cause: took[cause] for cause in _OF_WORKERS if took[cause] > 0.0}
    did = _Did(seconds, account.map_cpu_s - cpu_before_s, account.filtered)
    try:
        link.send((answers, did))
    except LinkClosedError:
        raise
    except BaseException:  # something that was made cannot be pickled
        link.send((_sendable(answers), did))


def _sendable(answers: list[tuple[bool, Any]]) -> list[tuple[bool, Any]]:
    """The answers up to the first that cannot be pickled, which becomes an error."""
    sendable: list[tuple[bool, Any]] = []
    for answer in answers:
        try:
            dump_apart(answer, io.BytesIO())
        except BaseException as error:
            return [*sendable, (False, _packed(error))]
        sendable.append(answer)
    return sendable


def _packed(error: BaseException) -> tuple[bytes | None, str, str, str]:
    """An error, as `_rebuilt` takes it."""
    if callers.is_for_the_user(error):
        callers.shortened(error)
    # Without a frame of the user's it would say again what the error says.
    has_text = error.__traceback__ is not None or error.__cause__ is not None
    text = "".join(traceback.format_exception(error)) if has_text else ""
    pickled = None
    with contextlib.suppress(Exception):  # then its name and message are all that can be said
        pickled = pickle.dumps(error)
    return pickled, type(error).__name__, str(error), text
