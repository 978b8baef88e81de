"""The shards that golden orders and states are of: local files whose path and times are the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fastload
from tests.jobs.reading import SMALL
from tests.jobs.states import URL, shards_in_place

MIXTURES: tuple[dict[str, Any], ...] = ({"stop": "first"}, {"stop": "all", "seed": 3}, {"stop": "never", "seed": 1})


@contextmanager
def world(folder: Path) -> Iterator[fastload.Cache]:
    """A cache beside the shards, whose service is in this process: another would not see them. What the environment
    says of ranks and stores is left out; certificates alone would take a third of the time.
    """
    shards = {"shard_count": 6, "samples_per_shard": 10, "value_bytes": 300}
    with mock.patch.dict(os.environ), shards_in_place(folder, shards):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SSL_CERT_DIR", "SSL_CERT_FILE"):
            os.environ.pop(name, None)
        with fastload.Cache(folder / "cache", **SMALL, service="inprocess") as cache:
            yield cache


def data_set(cache: fastload.Cache, **options: Any) -> fastload.StreamingDataset:
    """All shards."""
    return fastload.StreamingDataset(URL, cache=cache, **{"shuffle_window": "16KiB", "columns": ["cls"], **options})


def mixture(cache: fastload.Cache, **options: Any) -> fastload.Mixture:
    """Three of the shards' halves and all, with other seeds and orders."""
    common = {"cache": cache, "shuffle_window": "16KiB", "columns": ["cls"]}
    first = fastload.StreamingDataset(f"{URL}shard-000{{0..2}}.tar", shuffle=True, seed=1, **common)
    second = fastload.StreamingDataset(f"{URL}shard-000{{3..5}}.tar", shuffle="shards", seed=2, **common)
    return fastload.Mixture([(first, 0.7), (second, [(0, 0.3), (20, 0.6)])], **options)
