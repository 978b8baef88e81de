"""How a `DataLoader` reads data sets that are not fastload's own: map-style and iterable, in torch's way.

torch's iterators are kept, so that order, seeds, checks and messages are torch's. Two things are added: batches cross
from worker processes through reused shared memory (`fastload.transport.packing`), and an iteration can save its
position and resume from one.

`reading` is what a loader holds and the place to start. `iterators`, `process_iterator` and `thread_iterator` are for
the calling thread, worker processes and worker threads; `worker` is what runs in a worker beside torch's code, and
`thread_workers` starts and stops the threads. `sampling` is a sampler that can resume (by the random state that
`randomness` keeps), `progress` counts what was delivered, `loader_state` is the layout of a saved state, and
`worker_info` answers torch's `get_worker_info()` in threads.
"""
