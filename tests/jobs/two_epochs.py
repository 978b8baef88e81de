"""A script for torchrun: reads two epochs, and leaves what its rank got in a file.

    torchrun ... -m tests.jobs.two_epochs '{"urls": [...], "folder": "..."}'

Each node has a cache of its own below the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as distributed

import fastload
from tests.jobs.reading import SMALL


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder, node = Path(settings["folder"]), os.environ["GROUP_RANK"]
    distributed.init_process_group("gloo")
    cache = fastload.Cache(folder / f"cache-{node}", **SMALL)
    dataset = fastload.StreamingDataset(settings["urls"], cache=cache, shuffle=True, columns=["cls"])
    loader = fastload.DataLoader(dataset, batch_size=4, num_workers=1)
    epochs, fetched_bytes = [], []
    for _ in range(2):
        epochs.append([list(batch["__key__"]) for batch in loader])
        distributed.barrier()
        fetched_bytes.append(cache.stats()["fetched_bytes"])
        distributed.barrier()
    found = {"node": node, "epochs": epochs, "fetched_bytes": fetched_bytes}
    (folder / f"rank-{distributed.get_rank()}.json").write_text(json.dumps(found))
    loader.close()
    cache.close()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
