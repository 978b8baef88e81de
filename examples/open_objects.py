"""A map-style data set of single objects, read through the node's cache by torch's own loader.

    python examples/open_objects.py s3://bucket/images/0.jpg s3://bucket/images/1.jpg ...

The first epoch fetches each object, the second finds all of them in the cache.
"""

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
    cache = fastload.Cache()  # $FASTLOAD_CACHE says where
    loader = torch.utils.data.DataLoader(Objects(urls, cache), BATCH_SIZE, shuffle=True, num_workers=WORKERS)
    with fastload.open(urls[0], cache):  # so that the service stays between epochs, whatever these take
        for epoch in range(EPOCHS):
            began = time.perf_counter()
            byte_count = sum(int(batch.sum()) for batch in loader)
            seconds = time.perf_counter() - began
            fetched = cache.stats()["fetched_bytes"]
            print(f"epoch {epoch}: {byte_count} bytes in {seconds:.1f} s; fetched so far: {fetched} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
