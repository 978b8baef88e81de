"""Writes the data in this folder with the formats' own writers, in an environment that has them; give their names:

python tests/formats/written/make.py tfrecord litdata
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def tfrecord() -> None:
    """By tfrecord 1.14, which needs protobuf and crc32c."""
    from tfrecord.writer import TFRecordWriter

    for part in range(2):
        writer = TFRecordWriter(str(HERE / "tfrecord" / f"train.tfrecord-0000{part}-of-00002"))
        for i in range(15 * part, 15 * part + 15):
            writer.write(
                {
                    "image": (bytes(range(i)), "byte"),
                    "label": (i - 5, "int"),
                    "score": (i / 7, "float"),
                    "box": (np.arange(4, dtype=np.float32) * i, "float"),
                    "tokens": ([n * -(3**i) for n in range(i % 6)], "int"),
                    "words": ([f"w{n}é".encode() for n in range(i % 4)], "byte"),
                }
            )
        writer.close()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (HERE / name).mkdir(exist_ok=True)
        {"tfrecord": tfrecord}[name]()
