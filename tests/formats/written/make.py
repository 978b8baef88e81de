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

    (HERE / "tfrecord").mkdir(exist_ok=True)
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


def mds_lines() -> None:
    """By mosaicml-streaming 0.13: shards that are text, with digests, some of them packed."""
    from streaming import CSVWriter, JSONWriter, TSVWriter, XSVWriter

    columns = {"Name": "str", "id": "int", "score": "float", "größe": "int"}
    ways = {
        "mds_json": (JSONWriter, {"hashes": ["sha1", "xxh64"]}),
        "mds_json_zstd": (JSONWriter, {"compression": "zstd", "hashes": ["md5"]}),
        "mds_csv": (CSVWriter, {"hashes": ["xxh3_64"]}),
        "mds_tsv": (TSVWriter, {"compression": "gz", "newline": "\r\n"}),
        "mds_xsv": (XSVWriter, {"separator": "::", "newline": "é"}),
    }
    for name, (writer, options) in ways.items():
        with writer(columns=columns, out=str(HERE / name), size_limit=900, **options) as out:
            for i in range(24):
                text = f"n{chr(228) if name != 'mds_xsv' else 'a'}me {i}" + "|" * (i % 2)
                out.write({"Name": text, "id": i - 3, "score": i / 3 if i else float("nan"), "größe": 2**i})


def energon() -> None:
    """Tars by webdataset 1.0, and what megatron-energon 7.4 makes beside them, but for its database."""
    import webdataset
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    folder, number = HERE / "energon", 0
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate([2, 1, 3]):
        with webdataset.TarWriter(str(folder / "shards" / f"{shard}.tar"), mtime=1700000000.25) as writer:
            for _ in range(count):
                writer.write({"__key__": f"in/{number:03}", "txt": f"text {number}", "bin": bytes([number]) * number})
                number += 1
    patterns = [("train", "shards/[02]"), ("val", "shards/1")]
    paths = ["shards/{0..2}.tar"]
    WebdatasetPreparator.prepare_dataset(EPath(folder), paths, split_parts_patterns=patterns, workers=1)
    for path in (folder / ".nv-meta").glob("index.*"):
        path.unlink()


def litdata() -> None:
    """By litdata 0.2.76, classic items; and what is packed by items, in frames and as a whole, in folders beside it."""
    import torch
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.serializers import JsonLeaf
    from litdata.types import Image, Jpeg, JpegArray
    from PIL import Image as Pillow

    ways = {
        "litdata": {},
        "litdata_zstd": {"compression": "zstd", "compression_level": "sample"},
        "litdata_frames": {"compression": "zstd", "compression_batch_size": 3},
        "litdata_whole": {"compression": "zstd:4", "compression_level": "chunk"},
    }
    for name, options in ways.items():
        cache = Cache(input_dir=str(HERE / name), chunk_size=8 if options else 2, **options)
        for i in range(24):
            picture = Pillow.new("RGB", (3 + i % 2, 2), (10 * i, 5 * i, i))
            cache[i] = {
                "id": i - 3,
                "meta": {"näme": f"é{i}", "ok": i % 3 == 0, "pair": (i / 7, bytes(range(i)))},
                "words": JsonLeaf({"ids": list(range(i % 4)), "rows": [{"a": i, "b": None}, {"a": -1, "b": "x"}]}),
                "matrix": torch.arange(6, dtype=torch.int16).reshape(2, 3) * i,
                "row": torch.arange(i % 5, dtype=torch.float32),
                "grid": np.ones((1 + i % 2, 2), np.float16) * i,
                "line": np.arange(i % 3, dtype=np.uint16),
                "bare": picture,
                "png": Image(array=np.asarray(picture), format="png"),
                "jpegs": JpegArray([Jpeg(array=np.asarray(picture))] * (1 + i % 2)),
            }
        cache.done()
        cache.merge()
    for name, array in (("litdata_tokens", torch.tensor), ("litdata_tokens_numpy", np.array)):
        dtype = torch.int32 if name == "litdata_tokens" else np.uint16
        cache = Cache(input_dir=str(HERE / name), chunk_size=100, item_loader=TokensLoader(block_size=16))
        for i in range(60):  # documents of 1 to 40 tokens, each 100 i and its number
            cache[i] = array([100 * i + n for n in range(1 + i * 7 % 40)], dtype=dtype)
        cache.done()
        cache.merge()
    cache = Cache(input_dir=str(HERE / "litdata_table"), chunk_size=300)
    for i in range(700):  # a table has 256 rows in a piece
        cache[i] = {
            "id": i - 3,
            "text": f"né{i}" * (i % 5),
            "note": None if i % 3 else f"note {i}",
            "score": i / 7,
            "ok": i % 4 == 0,
            "raw": bytes(range(i % 9)),
            "ids": list(range(i % 4)),
            "meta": {"a": i * i, "b": {"c": f"c{i}"}},
            "words": ["x"] * (i % 3),
        }
    cache.done()
    cache.merge()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        {"tfrecord": tfrecord, "litdata": litdata, "mds_lines": mds_lines}[name]()
