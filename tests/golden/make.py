"""Record golden values with the fastload that is imported: `python -m tests.golden.make [KIND ...]`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.golden import figures, formats, frames, orders, signatures, states, texts

KINDS = {
    "figures": figures.record,
    "formats": formats.record,
    "frames": frames.record,
    "orders": orders.record,
    "signatures": signatures.record,
    "states": states.record,
    "torchdata": states.record_of_torchdata,
}


def main() -> None:
    os.environ["FASTLOAD_IDLE_S"] = "0"
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            texts.save(kind, KINDS[kind](Path(folder)))


if __name__ == "__main__":
    main()
