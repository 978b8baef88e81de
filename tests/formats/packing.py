"""Packs bytes in the ways that are read, by the ending of a name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa


def by_arrow(name: str) -> Callable[[bytes], bytes]:
    return lambda data: bytes(pa.Codec(name).compress(data))


def zstd_stream(data: bytes) -> bytes:
    """As `zstd` packs what comes through a pipe: no frame says its size."""
    out = io.BytesIO()
    with pa.CompressedOutputStream(pa.PythonFile(out, mode="w"), "zstd") as stream:
        stream.write(data)
        out.close = lambda: None  # type: ignore[method-assign]  # by pyarrow, with what was written
    return out.getvalue()


def twice(pack: Callable[[bytes], bytes], first: float = 0.5) -> Callable[[bytes], bytes]:
    """Two members or frames, of which the first has that share of the bytes."""
    return lambda data: pack(data[: int(first * len(data))]) + pack(data[int(first * len(data)) :])


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": by_arrow("zstd"),
    ".zstd": by_arrow("zstd"),
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".br": by_arrow("brotli"),
    ".snappy": by_arrow("snappy"),
    ".tgz": gzip.compress,
}


def framed(chunk: bytes, items_per_frame: int) -> bytes:
    """A chunk of LitData whose items are packed some in each frame, as litdata 0.2.76 does by default."""
    (count,) = struct.unpack_from("<I", chunk)
    ends = struct.unpack_from(f"<{count + 1}I", chunk, 4)
    firsts = range(0, count, items_per_frame)
    raw = [chunk[ends[first] : ends[min(first + items_per_frame, count)]] for first in firsts]
    packed = [PACK[".zstd"](each) for each in raw]
    at, table = 24 + 4 * (count + 1) + 24 * len(raw), b""
    for first, each, data in zip(firsts, raw, packed, strict=True):
        table += struct.pack("<IIQII", first, min(items_per_frame, count - first), at, len(data), len(each))
        at += len(data)
    head = struct.pack("<8sHHIII", b"LDFZ01\0\0", 1, 0, count, items_per_frame, len(raw))
    return head + struct.pack(f"<{count + 1}I", *(end - ends[0] for end in ends)) + table + b"".join(packed)


def pack_folder(folder: Path, ending: str) -> None:
    """Pack all shards in a folder, which an MDS index there names from then on."""
    for path in sorted(folder.iterdir()):
        if path.name != "index.json":
            path.with_name(path.name + ending).write_bytes(PACK[ending](path.read_bytes()))
            path.unlink()
    about = folder / "index.json"
    if about.exists():
        index = json.loads(about.read_bytes())
        for shard in index["shards"]:
            name = shard["raw_data"]["basename"] + ending
            shard["zip_data"] = {"basename": name, "bytes": (folder / name).stat().st_size}
        about.write_text(json.dumps(index))
