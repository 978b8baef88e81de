"""How a `DataLoader` reads data sets that are not fastload's own: map-style and iterable, in torch's way.

torch's iterators are kept, so that order, seeds, checks and messages are torch's. Two things are added: batches cross
from worker processes through reused shared memory (`fastload.transport.packing`), and an iteration can save its
position and resume from one.

`reading` is what a loader holds and the place to start. `iterators`, `processes` and `threads` are the iterators, for
the calling thread, worker processes and worker threads; `worker` is what runs in a worker beside torch's code, and
`thread_workers` starts and stops the threads. `order` is a sampler that can resume, `progress` counts what was
delivered, and `state` is the layout of a saved state.
"""
