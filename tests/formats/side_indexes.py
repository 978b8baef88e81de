"""What the tools of Energon and DALI write beside shards."""

from __future__ import annotations

import io
import re
import struct
import tarfile

_SAMPLE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


def energons(data: bytes) -> bytes:
    """`a.tar.idx`, as `energon prepare` has it."""
    starts, last = [], None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            match = _SAMPLE.match(member.name)
            if not member.isreg() or match is None or re.match(r"__[^/]*__($|/)", member.name):
                continue
            if match[1] != last:
                starts.append(member.offset)
                last = match[1]
        starts.append(archive.offset)
    return struct.pack(f"<{len(starts)}Q", *starts)


def dalis(data: bytes) -> bytes:
    """`a.idx`, as `wds2idx` has it."""
    samples: list[list[str]] = []
    last = None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            dot = member.name.find(".", member.name.rfind("/") + 1)
            base, ending = member.name[:dot], member.name[dot + 1 :]
            if member.type != tarfile.REGTYPE or not base or base.endswith("/"):
                continue
            if base != last:
                samples.append([])
                last = base
            samples[-1].append(f"{ending} {member.offset_data} {member.size} {member.name}")
    return f"v1.2 {len(samples)}\n".encode() + "".join(" ".join(each) + "\n" for each in samples).encode()


def dalis_of_records(data: bytes) -> bytes:
    """`a.idx`, as `tfrecord2idx` has it."""
    lines, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        lines.append(f"{at} {size + 16}\n")
        at += size + 16
    return "".join(lines).encode()
