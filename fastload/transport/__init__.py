"""How batches cross from one process to another: large buffers through shared memory, the rest beside them.

`Link` is one end of a connection between two processes, and `memory.SharedPool` the memory that each end writes its
large buffers into. Nothing here has a name in a file system, and nothing is left when both processes are gone.
"""

from __future__ import annotations

from fastload.transport.link import Link, LinkClosedError
from fastload.transport.memory import SharedPool

__all__ = ["Link", "LinkClosedError", "SharedPool"]
