"""`fastload bench`: how fast can this data be fed here, and what limits it?

- `limits`: what the store, the disk, the memory and the decoders give by themselves.
- `runs`: what fastload gives, in a process of its own for each state of the cache.
- `own`: the user's own loader beside that; `peers`: other loaders, and ours in turns with them.
- `demand` (pure): how often a consumer may ask for a batch.
- `prediction`: what later epochs would give with other disk caches; `digests`: whether two loaders gave the same.
- `workloads`: data with the sizes of MLPerf Storage's.
- `plan`: what is read; `passes` and `figures`: what a pass over the data is, and the figures of several.
- `verdict` (pure): what that means, in sentences; `compare` (pure): whether two results differ.
- `schema`: what is written down; `report`: how it is shown. `session` puts all of it together.

`measure` reads what processes cost from /proc; developers' benchmarks (`bench/`, in a checkout) use it too.
"""
