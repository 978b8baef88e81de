"""What a cache keeps where it cannot keep all. Pure: no clock, no I/O; the service applies what is decided here.

Which policy is right follows from what is known of the order:

    pin      each chunk is read once an epoch. No policy, not even one that sees the future, can then hit more than the
             cache's share of the data, and holding on to any one set hits just that. Which set, is free to choose.
    future   each chunk is read many times an epoch, in an order that is known: what is needed last goes first.
    sieve    nothing is known.
    lru      for users who ask for it. Of data that is read in rounds it keeps next to nothing.

Chunks without a use are evicted before all others, under each policy.
"""

from __future__ import annotations

from typing import Literal

PolicyName = Literal["pin", "future", "sieve", "lru"]
"""A policy, once "auto" has been settled."""

BLIND: frozenset[str] = frozenset({"sieve", "lru"})
"""Those that make nothing of a known order."""
