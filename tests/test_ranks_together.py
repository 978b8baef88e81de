"""The ranks of one node, in processes of their own that run at the same time over one cache."""

import json
import os
from pathlib import Path

import fastload
from tests.programs import Program
from tests.shards import corpus

LIMITS = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}

# Each rank reads one epoch, then says what it got.
RANK = """
import json, sys, fastload
cache = fastload.Cache(sys.argv[2], **json.loads(sys.argv[3]))
dataset = fastload.StreamingDataset(sys.argv[1], cache=cache, shuffle=True, seed=7)
loader = fastload.DataLoader(dataset, batch_size=4, num_workers=1)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([list(batch["__key__"]) for batch in loader]), flush=True)
sys.stdin.readline()
loader.close()
"""


def test_ranks_at_once_read_everything_once_and_fetch_each_byte_once(s3, tmp_path: Path) -> None:
    data = corpus(shard_count=8, samples_per_shard=30)
    url, directory, world_size = data.put(s3), tmp_path / "cache", 3
    ranks = [
        Program(
            RANK,
            url,
            directory,
            json.dumps(LIMITS),
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)},
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    batches = [json.loads(rank.stdout.readline()) for rank in ranks]
    with fastload.Cache(directory) as cache:
        node = cache.stats()
    for rank in ranks:
        rank.communicate("\n")
    keys = [key for batches_of_rank in batches for batch in batches_of_rank for key in batch]
    assert set(keys) == set(data.samples)
    assert len(keys) - len(set(keys)) == -len(data.samples) % world_size
    assert len({len(batches_of_rank) for batches_of_rank in batches}) == 1
    assert node["fetched_bytes"] == data.byte_count
    # Global batch by global batch they are what one rank with the whole batch size would read.
    whole = fastload.DataLoader(
        fastload.StreamingDataset(url, cache=fastload.Cache(directory), shuffle=True, seed=7),
        batch_size=4 * world_size,
    )
    for number, batch in enumerate(whole):
        together = [key for batches_of_rank in batches for key in batches_of_rank[number]]
        assert set(together) == set(batch["__key__"]) or number == len(whole) - 1
    whole.close()
