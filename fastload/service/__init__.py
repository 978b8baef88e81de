"""The node's cache service: the one owner of what is in RAM and on disk, for all processes of a node.

One thread, the loop's, changes all state; threads beside it do what blocks. Trainers reach it through `client`.

A message comes in by `server` and goes to `core`, which owns the rest. In the order of a chunk's life: `state` has the
classes of what is known, and `shared_state` all of it; `leases` and `plans` who wants and needs what; `candidates` what
to load next; `scheduler` and `eviction` decide what is loaded where and what goes for it; `residency` carries that out,
over `buffers`, `fetches` (as many requests as `request_limit` allows, to `stores`) and `disk_io`. `queries`, `openings`
and `indexes` answer messages, `clearing` empties the cache; `recording` and `replay` keep and use history. All is built
on `resources`, `threads` and `events`; `process`, `launch`, `inprocess` and `logs` run it.
"""
