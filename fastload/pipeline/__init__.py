"""From the plan to batches.

In the order of the way: `shard_listing` and `manifest_files` give the list of shards, `job` and `agreement` what this
rank reads of it, `source` the consumers of the cache. A pass (`epoch_pass`) has a `feed`, which opens `windows`
through a `reader`, from indexes (`shards`) and sample counts (`counts`). `gather` copies the bytes of an entry's
samples out of the cache, `finish` makes a batch of them (`columns` says how; `workers` may do it in processes), and
`delivery` runs all of that in threads and hands batches out in order. `resume` and `epoch_counter` keep the place of an
iteration over samples; `lookup` finds samples by number.
"""
