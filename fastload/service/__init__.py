"""The node's cache service: the one owner of what is in RAM and on disk, for all processes of a node.

One thread, the loop's, changes all state; threads beside it do what blocks. Trainers reach it through `client`.

A message comes in by `host.server` and goes to `core`, which owns the rest. In the order of a chunk's life: `state` has
the classes of what is known, and `shared_state` all of it; `leases` who wants what; `deciding` what live plans need,
what to load next, where to, and what goes for it; `residency` carries that out, over `fetching` (as many requests as
each store bears) and `disk_io`. `holding` is what is held and kept: data sets, pins, the catalog. `queries` and
`indexes` answer messages, `operators` those who watch and steer; `recording` and `replay` keep and use history. All is
built on `resources` and `events`; `host` runs it.
"""
