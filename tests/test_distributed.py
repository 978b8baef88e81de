"""Ranks that are one torch.distributed job: one list of shards, and one error where they are not alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastload
from tests.shards import corpus

RANK = """
import json, sys
import torch.distributed as distributed
import fastload

rank, settings = int(sys.argv[1]), json.loads(sys.argv[2])
distributed.init_process_group("gloo", init_method="file://" + settings["meet"], rank=rank, world_size=2)
cache = fastload.Cache(settings["caches"][rank], ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB")
options = {"shuffle": True, **settings["options"][rank]}
loader = fastload.DataLoader(fastload.StreamingDataset(settings["urls"][rank], cache=cache, **options), batch_size=4)
if rank == settings["without_cache"]:
    def broken(*arguments, **options):
        raise fastload.CacheError("no room for the cache")
    fastload.Cache.consumer = broken
if settings["states"][rank]:
    loader.load_state_dict(settings["states"][rank])
try:
    print(json.dumps([batch["__key__"] for batch in loader]), flush=True)
except fastload.FastloadError as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
loader.close()
distributed.destroy_process_group()
"""


def run_ranks(
    tmp_path: Path, urls: list[str], options: list[dict[str, Any]], environ: dict[str, str] | None = None, **more: Any
) -> list[Any]:
    caches = [str(tmp_path / "cache")] * 2
    settings = {"meet": str(tmp_path / "meet"), "caches": caches, "urls": urls, "options": options}
    settings = {**settings, "states": [None, None], "without_cache": None, **more}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), json.dumps(settings)],
            env={**os.environ, **(environ or {}), "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=100)[0].splitlines()[-1]) for rank in ranks]


def test_ranks_take_the_list_of_rank_0(s3, tmp_path: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    # Rank 1 would have found other shards.
    batches = run_ranks(tmp_path, [url, f"{url}shard-0000.tar"], [{}, {}])
    keys = [key for batches_of_rank in batches for batch in batches_of_rank for key in batch]
    assert set(keys) == set(data.samples)
    assert len(keys) - len(set(keys)) == len(data.samples) % 2


@pytest.mark.parametrize(
    ("options", "says"), [({"seed": 1}, "seed: 0 on rank 0 and 1 on rank 1"), ({"tail": "drop"}, "tail: 'pad' on")]
)
def test_ranks_that_differ_fail_together(s3, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    url = corpus(shard_count=1).put(s3)
    for name, message in run_ranks(tmp_path, [url, url], [{}, options]):
        assert name == "ConfigError"
        assert says in message


def test_an_error_of_the_listing_reaches_every_rank(s3, tmp_path: Path) -> None:
    for name, message in run_ranks(tmp_path, [f"{s3.url}/none/"] * 2, [{}, {}]):
        assert name == "ObjectMissingError"
        assert "/none/" in message


def test_a_rank_that_lacks_the_state_of_the_others_is_found_out(tmp_path: Path) -> None:
    url = corpus(shard_count=1).write(tmp_path / "data")
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB")
    options = {"shuffle": True, "shuffle_window": "64KiB"}
    dataset = fastload.StreamingDataset(url, cache=cache, rank=0, world_size=2, **options)
    loader = fastload.DataLoader(dataset, batch_size=4)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    for name, message in run_ranks(tmp_path, [url, url], [options, options], states=[state, None]):
        assert name == "ConfigError"
        assert "ranks differ in where they begin" in message
        assert "epoch 0, after 8 samples" in message
        assert "epoch 0, after 0 samples" in message


def test_a_node_without_a_cache_keeps_no_other_waiting(tmp_path: Path) -> None:
    url = corpus(shard_count=2).write(tmp_path / "data")
    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    caches = [str(tmp_path / "cache"), str(tmp_path / "other")]
    (_, of_0), (name, of_1) = run_ranks(tmp_path, [url, url], [{}, {}], nodes, caches=caches, without_cache=1)
    assert name == "CacheError"
    assert of_0 == f"on rank 1: {of_1}"
