"""Time at the processor: fastload's threads let the one that trains go first.

A thread that trains sleeps most of the time, and its steps are short: a transfer is done, the next batch is taken. When
it wakes up where a thread of fastload has begun to copy a batch, Linux may leave it there until that thread's time
slice is over, which is 3 to 4 ms later, even with another processor idle (in a virtual machine, an idle one looks as if
it was taken away). Three things help, of which the first two need each other: on two processors, with 100 batches of 23
MB a second gathered by one thread, one that sleeps for half a millisecond at a time came more than 1.2 ms late 38 times
a second; 19 with yielding, 15 with long slices, 4 with both, which is as often as with threads that only run when
nothing else does.

- *Long slices.* A thread may say how long its time slices are to be (sched_setattr(2), "sched_runtime" of a normal
policy,
  since Linux 6.12). Who is woken and asks for shorter ones, as all do that say nothing, then comes at once, wherever it
  is due by the time that it has used; no thread's share changes. Older kernels ignore it. What such a thread
  starts begins with its slices.
- *Yielding.* It is not due, by some microseconds, where it has just been woken twice: Python wakes who waits for
  the GIL while it still holds the lock around it. So kernels that take long yield when they begin
  (`fastload.kernels.yielding`).
- *Breath.* Nor does it help to be woken where the GIL is gone again by then: that takes tens of microseconds, and a
  thread that goes through its Python a call at a time, as the one that plans batches does for a millisecond a window,
  lets go for a few, again and again (it is made to wait for others after 5 ms). So as long as that one is ahead of what
  is needed, it sleeps for a moment between its steps: late wake-ups went from 5.4 to 4, of which 1.6 are the machine's.

Rejected: SCHED_IDLE and a higher niceness, with which other work leaves a loader no time at all; short slices
(0.1 ms), which make it worse; yielding before the GIL is taken back, which changes nothing, or before the kernel is
called, which comes too early.
"""

from __future__ import annotations

import ctypes
import platform
import threading
import time

__all__ = ["breathe", "let_breathe", "take_long_slices"]

# Longer than the default, which is 0.7 to 3 ms, and no longer than it has to be.
_SLICE_NS = 5_000_000

# What it takes to be woken on an idle processor, and more is added by the kernel.
_BREATH_S = 50e-6

_libc = ctypes.CDLL(None, use_errno=True)

# Of sched_setattr and sched_getattr, which few C libraries have: Linux, <asm/unistd.h>.
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
_NORMAL_POLICIES = (0, 3)  # SCHED_OTHER and SCHED_BATCH


class Attributes(ctypes.Structure):
    """struct sched_attr of <linux/sched/types.h>, first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def take_long_slices() -> bool:
    """Have the calling thread, one of fastload's, take long time slices, in which those that wake up for a short
    one come first.

    Returns whether the kernel knows it: not where the user has given this process another policy, where the system is
    not Linux, and where a sandbox forbids it. Nothing but others' wake-ups depends on it.
    """
    attributes = scheduling()
    if attributes is None or attributes.policy not in _NORMAL_POLICIES:
        return False
    if attributes.runtime_ns >= _SLICE_NS:  # all slices are on this machine, or the user has asked for it
        return True
    attributes.runtime_ns = _SLICE_NS
    return bool(_libc.syscall(_CALLS[platform.machine()][0], 0, ctypes.byref(attributes), 0) == 0)


def scheduling() -> Attributes | None:
    """How the calling thread is scheduled, where the system says that."""
    if platform.system() != "Linux" or platform.machine() not in _CALLS:
        return None
    attributes = Attributes()
    size = ctypes.sizeof(attributes)
    failed = _libc.syscall(_CALLS[platform.machine()][1], 0, ctypes.byref(attributes), size, 0)
    return None if failed else attributes


def let_breathe(is_ahead: bool) -> None:
    """Whether this thread is ahead of what is needed of it. By default it is not."""
    _this_thread.is_ahead = is_ahead


def breathe() -> None:
    """Called between two steps: a thread that waits for the GIL gets it now. Nothing happens where a thread waits for
    what comes of these steps, as the user's thread does for its own.
    """
    if _this_thread.is_ahead:
        time.sleep(_BREATH_S)


class _ThisThread(threading.local):
    is_ahead = False


_this_thread = _ThisThread()
