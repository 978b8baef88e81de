"""What a cache would do for a job, found out in virtual time: `fastload simulate`, and the same for tests.

Real is what decides: the service's core with its scheduler, controllers, plans, arcs and policies, and of the loader
the epoch's order, the feed and what it asks for and gives back. Made up is what takes time: the store (`network`), the
disk and the arena (`tiers`), and the trainer (`rank`). No byte of data is held, so caches of any size cost what their
records do.
"""

from fastload.simulate.scenario import STORES, Job, Node, StoreProfile
from fastload.simulate.world import EpochFigures, Run, World, simulate, sweep

__all__ = ["STORES", "EpochFigures", "Job", "Node", "Run", "StoreProfile", "World", "simulate", "sweep"]
