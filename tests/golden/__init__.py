"""What moving code must not change, written down: orders, states, frames, files, figures and signatures.

Each module but `make` and `doors` records one kind of these with the fastload that is imported, as JSON; beside it lies
what was recorded before, and `tests/test_golden.py` compares the two.

    python -m tests.golden.make [KIND ...]

records anew. Do that when something is added: what is recorded already is a promise to users, to states that they have
saved and to caches on their disks, and a change of it needs a version and a way to read the old form.
"""
