"""Which epoch an iteration is, at several nodes, in torch's workers, and where the next was prefetched in vain."""

from __future__ import annotations

import http.server
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.utils.data

import fastload
from tests.jobs.case import Case, Size
from tests.jobs.pool import Rank, RankPool
from tests.jobs.reading import SMALL, Reading, read
from tests.jobs.shelf import Shelf
from tests.patience import PATIENCE_S
from tests.plan.cluster import Cluster
from tests.processes import until
from tests.shards import tar_of

SHARDS = tuple(range(4, 16))
DATASET = {"shuffle": True, "columns": ["cls"]}


def expected(size: Size, rank: int, epoch: int, **changes: Any) -> list[list[str]]:
    return Case(SHARDS, size, **changes).model(size, epoch).batches(rank)


def read_some_epochs(rank: Rank, reading: Reading) -> list[list[list[str]]]:
    """Two epochs, one of which is left after a batch; then epoch 7, and the one after it."""
    os.environ.update(reading.environment)
    with fastload.Cache(reading.caches[rank.node], **reading.cache) as cache:
        dataset = fastload.StreamingDataset(reading.urls, cache=cache, **reading.dataset)
        loader = fastload.DataLoader(dataset, **reading.loader)
        found = [[batch["__key__"] for batch in loader]]
        found.append([batch["__key__"] for batch in islice(loader, 1)])
        torch.distributed.barrier()
        dataset.set_epoch(7)
        found += [[batch["__key__"] for batch in loader] for _ in range(2)]
        torch.distributed.barrier()
        loader.close()
    return found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_iteration_is_the_next_epoch_unless_one_is_set(
    pool: RankPool, shelf: Shelf, tmp_path: Path, num_workers: int
) -> None:
    """On two nodes, which are told nothing before and go on from an epoch that was left."""
    size = Size(2, 2, 3)
    reading = Reading(
        [shelf.urls[shard] for shard in SHARDS],
        [str(tmp_path / f"cache-{node}") for node in range(2)],
        DATASET,
        {"batch_size": 3, "num_workers": num_workers},
        dict(shelf.environment),
        {**SMALL, "service": "inprocess"},
    )
    found = pool.run("epochs", read_some_epochs, size.ranks(), reading)
    for rank, epochs in enumerate(found):
        assert epochs[0] == expected(size, rank, 0)
        assert epochs[1] == expected(size, rank, 1)[:1]
        assert epochs[2:] == [expected(size, rank, epoch) for epoch in (7, 8)]


@pytest.mark.parametrize("delivered", ["none of an epoch", "all of an epoch"])
def test_a_state_between_batches_of_two_epochs_goes_on_in_the_order_of_the_run(
    pool: RankPool, shelf: Shelf, tmp_path: Path, delivered: str
) -> None:
    """Saved on two nodes, which were left to choose two partitions; loaded on one, with as large global batches."""
    two, one = Size(2, 1, 4), Size(1, 1, 8)
    reading = Reading(
        [shelf.urls[shard] for shard in SHARDS],
        [str(tmp_path / f"cache-{node}") for node in range(2)],
        DATASET,
        {"batch_size": 4},
        dict(shelf.environment),
        {**SMALL, "service": "inprocess"},
        epoch=3,
        take=0 if delivered == "none of an epoch" else None,
    )
    state = pool.run("saved", read, two.ranks(), reading)[0].state
    epoch = 3 if delivered == "none of an epoch" else 4
    assert state["epoch"] == epoch
    reading = replace(reading, loader={"batch_size": 8}, epoch=None, take=None, state=state)
    (resumed,) = pool.run("loaded", read, one.ranks(), reading)
    assert resumed.batches == expected(one, 0, epoch, partitions=2)


def keys(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("rank", [0, 1])
def test_workers_of_torch_that_persist_learn_the_epoch_on_every_node(
    monkeypatch: pytest.MonkeyPatch, shelf: Shelf, tmp_path: Path, rank: int
) -> None:
    """Workers cannot ask other nodes for counts, so these are in the node's cache before."""
    size, urls = Size(2, 1, 3), [shelf.urls[shard] for shard in SHARDS]
    for name, value in {**shelf.environment, **Rank(rank, 2, 1).environment}.items():
        monkeypatch.setenv(name, value)
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        indexing = fastload.StreamingDataset(urls, cache=cache, partitions=1, columns=["cls"])
        assert sum(1 for _ in indexing) == len(indexing)
        indexing.close()
        dataset = fastload.StreamingDataset(urls, cache=cache, batch_size=3, **DATASET)
        loader: Any = torch.utils.data.DataLoader(
            dataset, batch_size=3, collate_fn=keys, num_workers=2, persistent_workers=True, timeout=PATIENCE_S
        )
        found = [list(loader) for _ in range(2)]
        dataset.set_epoch(7)
        found.append(list(loader))
        del loader
        dataset.close()
    assert found == [expected(size, rank, epoch) for epoch in (0, 1, 7)]


@dataclass
class Served:
    """Shards served over HTTP, and the numbers of those that were asked for, in order."""

    url: str
    asked: list[int]


@pytest.fixture
def served() -> Iterator[Served]:
    shards = [tar_of({f"{number:03}": {"cls": b"%d" % number}}) for number in range(160)]
    asked: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = int(self.path[1:4])
            asked.append(number)
            start, stop = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
            data = shards[number][int(start) : int(stop) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{len(shards[number])}")
            self.send_header("ETag", f'"{number}"')
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.server_port}/{{000..159}}.tar", asked)
        finally:
            listening.shutdown()
            thread.join()


def test_what_was_prefetched_of_a_wrong_next_epoch_is_discarded(served: Served, tmp_path: Path) -> None:
    """The arena holds a tenth of the shards, and there is no disk tier: nearly all is fetched in every epoch."""
    limits = {"ram_bytes": "1MiB", "disk_bytes": 0, "chunk_bytes": "64KiB"}

    def order_of(epoch: int) -> list[int]:
        cluster = Cluster((10240,) * 160, (1,) * 160, shuffle="shards", epoch=epoch)
        return [shard for ((shard, _),) in cluster.reference_batches(0)]

    with fastload.Cache(tmp_path / "cache", **limits, service="inprocess") as cache:
        dataset = fastload.StreamingDataset(served.url, cache=cache, shuffle="shards")
        loader = fastload.DataLoader(dataset, batch_size=1)
        batches = iter(loader)
        assert [int(next(batches)["cls"][0]) for _ in range(160)] == order_of(0)
        before = len(served.asked)
        assert next(batches, None) is None  # the epoch has been read to its end, and the next is prefetched
        until(lambda: len(served.asked) > before)
        until_quiet(served.asked)
        in_vain = served.asked[before:]
        assert misplaced(in_vain, order_of(1)) == []

        dataset.set_epoch(7)
        before = len(served.asked)
        batches = iter(loader)
        assert [int(next(batches)["cls"][0]) for _ in range(160)] == order_of(7)
        asked = served.asked[before:]
        assert len(asked) > 120
        assert misplaced(asked, order_of(7)) == []
        assert len(misplaced(asked, order_of(1))) > 60  # it would be noticed
        loader.close()


def misplaced(asked: list[int], order: list[int]) -> list[int]:
    """Which requests are far from their place in that order, more than a few that are under way at a time."""
    places = [order.index(number) for number in asked]
    by_place = sorted(places)
    return [order[place] for place, due in zip(places, by_place, strict=True) if abs(place - due) > 16]


def until_quiet(asked: list[int]) -> None:
    """Wait until nothing more is asked for."""
    count = -1
    while count < len(asked):
        count = len(asked)
        time.sleep(0.3)
