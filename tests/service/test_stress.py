"""Many threads of several consumers, a tiny arena, all at random: everybody gets on, and all bytes are right."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.service.core import Core
from fastload.service.host import server
from tests.service.helpers import CHUNK_BYTES, FakeStore, chunks_of, random_bytes, read

OBJECT_COUNT = 8
ROUND_COUNT = 25


@pytest.mark.parametrize(("buffer_count", "disk_bytes"), [(2, 0), (2, 64 << 20), (3, 1 << 20), (12, 64 << 20)])
def test_everything_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_count: int, disk_bytes: int
) -> None:
    sizes = np.random.default_rng(0).integers(0, 4 * CHUNK_BYTES, OBJECT_COUNT).tolist()
    store = FakeStore(before_read=lambda url, start: time.sleep(start % 3 / 1000))
    objects = [store.put(str(number), random_bytes(number, size)) for number, size in enumerate(sizes)]
    monkeypatch.setattr(
        server, "Core", lambda directory, loop: Core(directory, loop, factory=lambda url, options: store)
    )
    wrong: list[object] = []

    def work(consumer: Consumer, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(ROUND_COUNT):
                numbers = rng.choice(OBJECT_COUNT, rng.integers(1, 4), replace=False).tolist()
                chunks = sorted(chunk for number in numbers for chunk in chunks_of(objects, number))
                if rng.random() < 0.3:
                    consumer.want(chunks)
                if rng.random() < 0.1:
                    consumer.set_plan(rng.permutation(OBJECT_COUNT))
                if rng.random() < 0.1:
                    consumer.advance(int(rng.integers(0, 20)))
                found = read(consumer, chunks)
                for number in numbers:
                    data = b"".join(found[chunk] for chunk in chunks_of(objects, number))
                    if data[: objects[number].size] != store.contents[objects[number].url]:
                        wrong.append(number)
                if rng.random() < 0.7:
                    consumer.release(chunks)
        except Exception as error:  # reported by the test's own thread
            wrong.append(error)

    with Cache(
        tmp_path / "cache",
        ram_bytes=buffer_count * CHUNK_BYTES,
        disk_bytes=disk_bytes,
        chunk_bytes=CHUNK_BYTES,
        service="inprocess",
    ) as cache:
        consumers = [cache.consumer(name=str(number)) for number in range(3)]
        for consumer in consumers:
            consumer.attach(objects)
            consumer.set_plan(range(OBJECT_COUNT))
        threads = [threading.Thread(target=work, args=(consumers[n % 3], n)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
