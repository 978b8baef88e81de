"""Checksums of stores: which cover the bytes that came, that they are used, and that they do not lead astray."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from obstore import put
from obstore.store import S3Store

from fastload.errors import StoreUnavailableError
from fastload.kernels import warm_up
from fastload.store import Counters, ObjectInfo, RequestOptions, RetryOptions, Store, StoreOptions, open_store, replies
from fastload.store.objectstore import ObjectStore
from fastload.store.replies import Checksum, checksum_of
from tests.conftest import Bucket
from tests.store.servers import Handler, Liar, server, whole

DATA = random.Random(1).randbytes(3000)
CHECK = b"123456789"  # whose check each polynomial's definition names


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def crc32(data: bytes) -> str:
    return encoded(zlib.crc32(data).to_bytes(4, "big"))


def sha256(data: bytes) -> str:
    return encoded(hashlib.sha256(data).digest())


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    """As pip builds it."""
    warm_up("crc")
    replies._has_kernel.cache_clear()


# Values of the definitions, not of the code.


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("crc32", "cbf43926"),
        ("crc32c", "e3069283"),
        ("crc64nvme", "ae8b14860a799888"),
        ("sha1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        ("md5", "25f9e794323b453885f5181f1b624d0b"),
    ],
)
def test_known_values(algorithm: str, value: str) -> None:
    checksum = Checksum(algorithm, bytes.fromhex(value))
    assert checksum.is_of(memoryview(CHECK))
    assert not checksum.is_of(memoryview(CHECK + b"0"))


def bitwise(polynomial: int, bits: int, data: bytes) -> int:
    ones = now = (1 << bits) - 1
    for byte in data:
        now ^= byte
        for _ in range(8):
            now = (now >> 1) ^ (polynomial if now & 1 else 0)
    return now ^ ones


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33, 1000])
@pytest.mark.parametrize(
    ("algorithm", "polynomial", "bits"), [("crc32c", 0x82F63B78, 32), ("crc64nvme", 0x9A6C9329AC4BC9B5, 64)]
)
def test_all_lengths(algorithm: str, polynomial: int, bits: int, length: int) -> None:
    data = DATA[:length]
    value = bitwise(polynomial, bits, data).to_bytes(bits // 8, "big")
    assert Checksum(algorithm, value).is_of(memoryview(bytearray(data)))


GOOGLE = f"crc32c={encoded(b'abcd')},md5={encoded(bytes(16))}"


@pytest.mark.parametrize(
    ("headers", "etag", "is_whole", "algorithm"),
    [
        ({}, '"e"', True, None),
        ({"X-Amz-Checksum-Crc32": crc32(DATA)}, '"e"', True, "crc32"),
        ({"x-amz-checksum-crc32": crc32(DATA)}, '"e"', False, None),
        ({"x-amz-checksum-crc32": crc32(DATA), "x-amz-checksum-type": "FULL_OBJECT"}, '"e-2"', True, "crc32"),
        # Of the checksums of parts; of a range from S3 itself it comes without its number of parts.
        ({"x-amz-checksum-crc32": crc32(DATA), "x-amz-checksum-type": "COMPOSITE"}, '"e-2"', True, None),
        ({"x-amz-checksum-crc32": crc32(DATA)}, '"e-2"', True, None),
        ({"x-amz-checksum-crc32": crc32(DATA) + "-7"}, '"e"', True, None),
        ({"x-amz-checksum-crc32": "AAA="}, '"e"', True, None),
        ({"x-amz-checksum-crc32": "!"}, '"e"', True, None),
        (
            {"x-amz-checksum-sha256": sha256(DATA), "x-amz-checksum-crc64nvme": encoded(bytes(8))},
            None,
            True,
            "crc64nvme",
        ),
        ({"x-amz-checksum-new": "AAAA"}, '"e"', True, None),
        ({"x-goog-hash": GOOGLE}, '"e"', True, "crc32c"),
        ({"x-goog-hash": GOOGLE}, '"e"', False, None),
        ({"x-goog-hash": GOOGLE, "x-goog-stored-content-encoding": "gzip"}, '"e"', True, None),
        (
            {"x-goog-hash": GOOGLE, "x-goog-stored-content-encoding": "gzip", "content-encoding": "gzip"},
            '"e"',
            True,
            "crc32c",
        ),
        ({"Content-MD5": encoded(bytes(16))}, None, True, "md5"),
        ({"Content-MD5": encoded(bytes(16))}, None, False, None),
        ({"Content-Digest": f"sha-256=:{sha256(DATA)}:"}, None, False, "sha256"),
        ({"Content-Digest": f"md5=:AAAA:, sha-512=:{encoded(bytes(64))}:"}, None, False, "sha512"),
        ({"Repr-Digest": f"sha-256=:{sha256(DATA)}:"}, None, False, None),
        ({"Repr-Digest": f"sha-256=:{sha256(DATA)}:"}, None, True, "sha256"),
    ],
)
def test_which_checksum_is_of_what_came(
    headers: dict[str, str], etag: str | None, is_whole: bool, algorithm: str | None
) -> None:
    checksum = checksum_of(headers.items(), etag, is_whole=is_whole)
    assert (checksum and checksum.algorithm) == algorithm


def test_google_may_send_one_header_for_each() -> None:
    headers = [("x-goog-hash", f"md5={encoded(bytes(16))}"), ("x-goog-hash", f"crc32c={encoded(b'abcd')}")]
    assert checksum_of(headers, None, is_whole=True) == Checksum("crc32c", b"abcd")


def test_no_check_waits_for_a_compiler(tmp_path: Path) -> None:
    """As in a cache service whose processor no object file is for: another checksum is used, or none; nothing is
    compiled, and no home directory made.
    """
    code = """
import sys
from pathlib import Path
from fastload.kernels import objects
from fastload.store.replies import checksum_of
objects.INSTALLED = Path(sys.argv[1])
crc32c, md5 = [("x-goog-hash", "crc32c=YWJjZA==")], [("x-goog-hash", "md5=AAAAAAAAAAAAAAAAAAAAAA==")]
for _ in range(2):
    assert checksum_of(crc32c, None, is_whole=True) is None
    assert checksum_of(crc32c + md5, None, is_whole=True).algorithm == "md5"
assert "numba" not in sys.modules
"""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("FASTLOAD_", "XDG_", "NUMBA_"))
    }
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "installed")],
        env={**environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not home.exists()


# Over sockets: a bit is flipped on the way.


@contextmanager
def opened(
    behave: Callable[[Handler], None], way: str, deadline_s: float = 60.0
) -> Iterator[tuple[Store, ObjectInfo, Counters]]:
    with server(behave) as options:
        url = "s3://b/a.tar"
        if way == "http":
            url, options = f"{options.endpoint_url}/a.tar", StoreOptions()
        counters = Counters()
        retry = RetryOptions(deadline_s=deadline_s, delay_s=0.001)
        store = open_store(url, options, RequestOptions(retry=retry, counters=counters))
        try:
            yield store, ObjectInfo(url, len(DATA), '"e"'), counters
        finally:
            store.close()


FLIPPED = DATA[:1500] + bytes([DATA[1500] ^ 4]) + DATA[1501:]
SUMS = {
    "direct": {"x_amz_checksum_crc32": crc32(DATA)},
    "http": {"x_goog_hash": f"md5={encoded(hashlib.md5(DATA).digest())}"},
}


@pytest.mark.parametrize("way", SUMS)
def test_a_flipped_bit_is_fetched_again(way: str) -> None:
    out = bytearray(len(DATA))
    liar = Liar(whole(FLIPPED, **SUMS[way]), whole(DATA, **SUMS[way]))
    with opened(liar, way) as (store, info, counters):
        store.read_into(info, 0, memoryview(out))
    assert bytes(out) == DATA
    assert counters.values()["bad_replies"] == 1
    assert not set(liar.used_after) & set(liar.lied_over)


@pytest.mark.parametrize("way", SUMS)
def test_one_that_stays_says_so(way: str) -> None:
    with (
        opened(whole(FLIPPED, **SUMS[way]), way, deadline_s=0.02) as (store, info, _),
        pytest.raises(
            StoreUnavailableError, match=rf"{re.escape(info.url)}: a bad reply.*bytes do not match the (crc32|md5)"
        ),
    ):
        store.read_into(info, 0, memoryview(bytearray(len(DATA))))


@pytest.mark.parametrize("way", SUMS)
def test_a_range_is_not_held_against_the_objects_checksum(way: str) -> None:
    out = bytearray(1000)
    with opened(whole(DATA, **SUMS[way]), way) as (store, info, counters):
        store.read_into(info, 500, memoryview(out))
    assert bytes(out) == DATA[500:1500]
    assert counters.values()["bad_replies"] == 0


def test_a_digest_of_a_range() -> None:
    out = bytearray(1000)
    digest = {"Content_Digest": f"sha-256=:{sha256(DATA[500:1500])}:"}
    with opened(Liar(whole(FLIPPED, **digest), whole(DATA, **digest)), "http") as (store, info, counters):
        store.read_into(info, 500, memoryview(out))
        assert counters.values()["bad_replies"] == 0  # the bit lies beyond
        store.read_into(info, 500, memoryview(out))
    assert bytes(out) == DATA[500:1500]


def test_a_real_store_gives_the_uploaders_checksum(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends it with a request for the whole object, and for nothing else."""
    options = s3.options
    writer = S3Store(
        s3.url.removeprefix("s3://"),
        endpoint=options.endpoint_url,
        access_key_id=options.access_key_id,
        secret_access_key=options.secret_access_key,
        region=options.region,
        checksum_algorithm="SHA256",
        client_options={"allow_http": True, "pool_max_idle_per_host": "0"},
    )
    put(writer, "a.tar", DATA)
    checked: list[str] = []
    is_of = Checksum.is_of

    def noted(self: Checksum, data: memoryview) -> bool:
        checked.append(self.algorithm)
        return is_of(self, data)

    monkeypatch.setattr(Checksum, "is_of", noted)
    store = ObjectStore(s3.url, options)
    info = store.head(f"{s3.url}/a.tar")
    for start, length in ((0, 3000), (0, 1000), (1000, 2000)):
        out = bytearray(length)
        store.read_into(info, start, memoryview(out))
        assert bytes(out) == DATA[start : start + length]
    store.close()
    assert checked == ["sha256"]
