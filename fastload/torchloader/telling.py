"""How often workers tell where their data sets are: the loader's `snapshot_every_n_steps`.

A state may be large, and whoever wants one wants it rarely; told with every batch, it is copied with every batch. So a
worker may tell only with some of its batches. Where the loader is, it then knows only at moments at which it has the
last state of each worker: a *snapshot*. In between it says where the last one was and how many batches came since,
which are made again, and thrown away, when that is loaded.

Batches are dealt to workers in turn. So if each tells after so many turns of its own, they tell one after another, and
the last to do so completes a snapshot; one whose data set has ended has told its last state, and is not waited for. But
nothing is built on their being in step: a snapshot is one because all states are there (see `progress`). Where workers
get out of step, the last snapshot is only older than it should be.
"""

from __future__ import annotations

from enum import Enum


class Untold(Enum):
    """What comes with a batch in the place of a state that is not told."""

    UNTOLD = "untold"


UNTOLD = Untold.UNTOLD


def turns_between_states(every_n_steps: int | None, num_workers: int, *, are_in_step: bool) -> int | None:
    """A worker tells its state with each of its batches whose number, from 1, is a multiple of this; None: never.

    So there is a snapshot every `every_n_steps` steps at least. `are_in_step`: whether workers take turns.
    """
    if not are_in_step:
        return 1
    return max(1, every_n_steps // num_workers) if every_n_steps else None
