"""Real loaders in real processes over a real store do what the reference model says, whatever the job.

`FASTLOAD_JOB_CASES=200 pytest tests/jobs/test_cases.py` runs as many cases as that, other ones each time; as it is, a
few that are always the same.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.jobs.case import Case, Mix, Size, cases
from tests.jobs.pool import RankPool
from tests.jobs.shelf import HUGE, Shelf
from tests.jobs.trial import Trial

_COUNT = int(os.environ.get("FASTLOAD_JOB_CASES", "0"))


@pytest.mark.timeout(600 + 10 * _COUNT)
@settings(
    max_examples=_COUNT or 4,
    derandomize=not _COUNT,
    deadline=None,
    database=None,
    # Not shrunk: that would take hundreds of jobs, and a case names all that it is.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(case=cases())
# Two nodes, whose partitions end at different times, without counts; then one node with a larger batch.
@example(case=Case(tuple(range(4, 18)), Size(2, 2, 4, 1), window=20_000, take=5, then=Size(1, 2, 8, 2, "environment")))
# Four nodes, where one shard is most of the data.
@example(case=Case((*range(4, 12), HUGE), Size(4, 1, 5, 1), window=1, epochs=2))
# Nodes that do not divide the partitions, told all counts by what their caches know.
@example(case=Case(tuple(range(4, 18)), Size(3, 1, 4, 0, "environment", is_indexed=True), partitions=4, tail="drop"))
# Fewer shards than nodes; more ranks than samples.
@example(case=Case((HUGE - 1, 4), Size(4, 1, 3, 0, service="auto"), take=2, then=Size(2, 2, 3, 1, service="auto")))
@example(case=Case((0, 2, 3), Size(2, 2, 4, 1), partitions=2, epochs=2))
# Samples that cannot be read, in batches that get shorter and not fewer.
@example(case=Case((13, 15, 17), Size(2, 1, 3, 2), skips=True, take=4, then=Size(1, 3, 2, 0)))
# A mixture on two nodes, that goes on at one.
@example(
    case=Case(
        (13, 15),
        Size(2, 1, 4, 1),
        take=3,
        mix=Mix(((0, 1.0),), (((16, 12), ((0, 2.0), (30, 0.5))),), "all"),
        then=Size(1, 2, 4, 0),
    )
)
def test_any_job(case: Case, pool: RankPool, shelf: Shelf) -> None:
    with tempfile.TemporaryDirectory(prefix="fastload-job-", ignore_cleanup_errors=True) as folder:
        Trial(case, pool, shelf, Path(folder)).run()
