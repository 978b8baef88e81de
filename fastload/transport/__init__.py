"""How batches cross from one process to another: large buffers through shared memory, the rest beside them.

There are two crossings. `Link` is one end of a connection between a trainer and a worker of fastload's own pipeline;
either end may send, and `SharedPool` is the memory that an end writes its large buffers into. `packing` and `queue` are
one-way, for worker processes of torch's loader, whose loop is torch's: a batch is packed into slots of the worker
(`worker_slots`) and passes through a queue.

Shared memory here has no name in a file system, so nothing is left behind when both processes are gone.
"""

from __future__ import annotations

from fastload.transport.link import Link, LinkClosedError, SharedPool

__all__ = ["Link", "LinkClosedError", "SharedPool"]
