"""`fastload bench`: how fast can this data be fed here, and what limits it?

- `plan`: what will be read, before anything is.
- `limits`: what the store, the disk, the memory and the decoders give by themselves.
- `runs`: what fastload gives, in a process of its own for each state of the cache.
- `demand`: how fast a consumer may be and still not wait.
- `verdict` (pure): what that means, in sentences; `compare` (pure): whether two results differ.
- `schema`: what is written down; `report`: how it is shown. `session` puts all of it together.

`measure` reads what processes cost from /proc; developers' benchmarks (`bench/`, in a checkout) use it too.
"""
