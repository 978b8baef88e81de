"""What happens, and when: functions of the seed, and of counts. No clock decides anything here.

The store's faults belong to numbers of requests, what is done to processes and to the disk to numbers of steps (a step
is a batch that all ranks of a job have got). So a seed gives the same schedule everywhere; which request is the
hundredth, and what is under way at the thousandth step, is up to the machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# How the store's answer to a request goes wrong. Of these only bodies that nothing contradicts could be believed, and
# there are none: each says by its status, length, range or version that it is not what was asked for.
FAULTS = {
    "drop": "closes the connection without an answer",
    "reset": "resets the connection without an answer",
    "truncate": "closes the connection in the middle of the body",
    "cut": "resets the connection in the middle of the body",
    "head-cut": "closes the connection in the middle of the head",
    "garbage": "answers with something else than HTTP",
    "stall": "accepts the request and says nothing",
    "stall-body": "says nothing more in the middle of the body",
    "pause": "pauses in the middle of the body, and goes on",
    "500": "answers 500",
    "503": "answers 503 SlowDown",
    "403": "answers 403 AccessDenied",
    "whole": "answers 200 with the whole object in place of a range",
    "shifted": "answers with another range of the object, and says so",
    "shorter": "answers with half of the range, and says so",
    "other": "answers with another object's bytes and ETag",
    "etag": "answers with the right bytes and another object's ETag",
    "mute": "accepts connections and does not read from them",
    "tls-flip": "flips a bit between client and TLS server",
}
# What no client can notice over plain HTTP, where nothing but the bytes themselves speaks against them. Only in runs
# that are about them.
LIES = {
    "flip": "flips a bit of the body",
    "lie": "answers with another range's bytes as if they were those asked for",
}

# What is done to processes, the cache directory and jobs: kind -> how often, relative to the others.
EVENTS = {
    "kill-service": 6,
    "kill-rank": 5,
    "kill-worker": 5,
    "kill-job": 3,
    "kill-all": 1,
    "stop-service": 2,
    "stop-rank": 3,
    "resize": 3,
    "full": 2,
    "eio": 2,
    "slow-disk": 1,
    "flip-chunk": 5,
    "cut-chunk": 3,
    "remove-chunk": 3,
    "flip-other": 2,
    "empty-directory": 1,
    "remove-directory": 1,
}
# The steps between two events, at least and at most.
GAP = (8, 40)


@dataclass(frozen=True)
class Event:
    """`kind` at step `step`. `draws` in [0, 1) decide whom it meets, and how much."""

    step: int
    kind: str
    draws: tuple[float, ...]

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind} ({', '.join(f'{draw:.3f}' for draw in self.draws)})"


def events(seed: int, without: Collection[str] = (), gap: tuple[int, int] = GAP) -> Iterator[Event]:
    """All that happens, without end. Switching kinds off leaves the others where they are."""
    if not set(EVENTS) - set(without):
        return
    rng = random.Random(f"fastload chaos events {seed}")
    step = 0
    while True:
        step += rng.randint(*gap)
        (kind,) = rng.choices(list(EVENTS), list(EVENTS.values()))
        event = Event(step, kind, tuple(rng.random() for _ in range(4)))
        if kind not in without:
            yield event


def fault_of(seed: int, request: int, share: float, kinds: Collection[str]) -> tuple[str, float] | None:
    """The fault of a request, with a draw in [0, 1) that says how much of it; None where all is well.

    `share` of the requests have one. `kinds` are those that are possible.
    """
    digest = hashlib.blake2b(f"fastload chaos request {seed} {request}".encode(), digest_size=24).digest()
    whether, which, amount = (int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8, 16))
    if whether >= share or not kinds:
        return None
    ordered = [kind for kind in (*FAULTS, *LIES) if kind in kinds]
    return ordered[int(which * len(ordered))], amount
