"""Who may spend which part of a node's cache: the numbers side by side, since together they must fit.

Of the arena, in buffers. Its arc and what consumers hold in windows are there at the same time, and make the whole. The
others bound how far work may spread over room that is not needed just now.
"""

from __future__ import annotations

ARC = 0.5
"""The arena's arc: chunks that should stay over epochs because the disk does not hold them
(`service.deciding.eviction`). The rest is for what is being read and what comes next."""

WINDOWS = 0.5
"""Windows of all lanes of a node, which are leased while samples are drawn from them (`plan.order`)."""

PREFETCH_LEAST, PREFETCH_MOST = 0.25, 0.5
"""How far ahead prefetching may displace what is used later: a quarter of a large arena, where requests need more as
much as they need, but never most of a small one (`service.deciding.eviction`)."""

WRITE_QUEUE = 0.75
"""Chunks that wait to be written to a slow disk: what is left lets training go on (`service.disk_io`)."""

READ_AHEAD = 0.125
"""What one file that is read in order may have read ahead (`files`)."""

INDEXING = 0.5
"""Chunks that are held while data sets are indexed ahead (`prepare`)."""

DISK_CHUNKS = 0.97
"""Of the disk quota, what chunks can be sure of: each has a trailer, blocks are rounded up, and indexes lie there too.
The rest is filled with what comes."""
