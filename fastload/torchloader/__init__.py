"""How a `DataLoader` reads data sets that are not ours: map-style and iterable, in torch's own way.

torch's iterators are kept (`processes`, `single`), so that order, seeds, checks and messages are torch's; what is ours
is how batches cross from worker processes (`packing`, `ledger`), and that an iteration can say where it is and begin
there (`order`, `saved`, `telling`, `resuming`). `workplace` is what runs in a worker process, and `reading` what a
loader holds.
"""
