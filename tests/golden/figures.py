"""The names of all figures, nested as they are, each with its type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastload
from tests.golden.world import data_set, mixture, world


def record(folder: Path) -> dict[str, Any]:
    """Of loaders before, in and after an epoch, of a cache, and of a consumer."""
    with world(folder) as cache:
        with fastload.DataLoader(data_set(cache), batch_size=4) as loader:
            before = named(loader.stats())
            iterator = iter(loader)
            next(iterator)
            within = named(loader.stats())
            for _ in iterator:
                pass
            after = named(loader.stats())
        with fastload.DataLoader(mixture(cache), batch_size=4) as loader:
            next(iter(loader))
            mixed = named(loader.stats())
        with cache._handle.consumer(name="figures") as consumer:  # what loaders and `Cache.stats` choose from
            consumer_figures = named(consumer.stats())
        return {
            "loader before an epoch": before,
            "loader within an epoch": within,
            "loader after an epoch": after,
            "loader of a mixture": mixed,
            "cache": named(cache.stats()),
            "consumer": consumer_figures,
        }


def named(figures: Any) -> Any:
    """Types by name, sorted."""
    if isinstance(figures, Mapping):
        return {name: named(figures[name]) for name in sorted(figures)}
    return type(figures).__name__
