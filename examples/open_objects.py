"""A map-style data set of single objects, read through the node's cache by torch's own loader.

    python examples/open_objects.py s3://bucket/images/0.jpg s3://bucket/images/1.jpg ...

or `torchrun --nproc-per-node 2` in place of `python`: each process reads its share. The first epoch fetches each
object, the second finds all of them in the cache, whichever process has fetched them.
"""

import os
import sys
import time

import torch.utils.data

import fastload

EPOCHS = 2
BATCH_SIZE = 16
WORKERS = 2


class Objects(torch.utils.data.Dataset[int]):
    """One sample is one object; here, how many bytes it has."""

    def __init__(self, urls: list[str], cache: fastload.Cache) -> None:
        self.urls, self.cache = urls, cache

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> int:
        with fastload.open(self.urls[number], self.cache) as file:
            return len(file.read())


def main(urls: list[str]) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cache = fastload.Cache()  # $FASTLOAD_CACHE says where
    objects = Objects(urls, cache)
    sampler: torch.utils.data.DistributedSampler[int] = torch.utils.data.DistributedSampler(objects, world_size, rank)
    loader = torch.utils.data.DataLoader(objects, BATCH_SIZE, sampler=sampler, num_workers=WORKERS)
    with fastload.open(urls[0], cache):  # so that the service stays between epochs, however long these take
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            byte_count = sum(int(batch.sum()) for batch in loader)
            seconds = time.perf_counter() - began
            fetched = cache.stats()["fetched_bytes"]
            who = f"rank {rank} epoch {epoch}"
            print(f"{who}: {byte_count} bytes in {seconds:.1f} s; the node has fetched {fetched} so far", flush=True)
    cache.close()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit("which objects? python examples/open_objects.py URL ...")
    main(sys.argv[1:])
