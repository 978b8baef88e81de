"""Two nodes under torchrun, simulated on one machine, which tell each other what they count."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

from tests.jobs.launch import Launched, free_port
from tests.jobs.test_nodes import even_corpus, keys_of


def test_two_nodes_read_all_samples_once_and_each_byte_on_one_of_them(s3, tmp_path: Path) -> None:
    data = even_corpus(16)
    settings = json.dumps({"urls": [data.put(s3)], "folder": str(tmp_path)})
    common = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    script = ["-m", "tests.jobs.two_epochs", settings]
    with (
        Launched([*common, "--node-rank", "0", *script]) as one,
        Launched([*common, "--node-rank", "1", *script]) as two,
    ):
        one.output()
        two.output()
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [rank["node"] for rank in found] == ["0", "0", "1", "1"]
    for epoch in range(2):
        of_ranks = [rank["epochs"][epoch] for rank in found]
        assert keys_of(list(chain.from_iterable(of_ranks))) == Counter(list(data.samples))
        assert len({len(batches) for batches in of_ranks}) == 1
    assert found[0]["epochs"][0] != found[0]["epochs"][1]
    # The shards are all alike, so partitions end together, and no node needs any byte of the other's.
    for rank in found:
        assert rank["fetched_bytes"] == [data.byte_count // 2] * 2
