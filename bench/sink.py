"""A store that takes uploads and forgets what is large: S3's words for what checkpoints need, at little cost.

A real server takes 12 CPU-seconds to receive a GB, which on two cores is all that would be measured. This one keeps
objects of less than 1 MiB, and of others their size, or all of them from `PUT /keep` on; checksums it repeats, and does
not compare. `GET /counters` says what came and went, `PUT /shut` has larger uploads refused until `PUT /open`, and
`PUT /cap/BYTES` takes all of them together at no more than that a second; 0: as fast as they come.

    python -m bench.sink        # prints its URL, and ends with its standard input
"""

from __future__ import annotations

import html
import itertools
import json
import re
import sys
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

from bench.proxy import RateClock

KEPT_BYTES = 1 << 20
_CHECKSUM = "x-amz-checksum-crc32"
_XML = "<?xml version='1.0' encoding='UTF-8'?>"


class Sink(ThreadingHTTPServer):
    """For any number of clients."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.objects: dict[str, tuple[bytes | memoryview, int, str]] = {}  # content if it is kept, size, ETag
        self.counters: Counter[str] = Counter()
        self.is_shut = self.keeps_all = False
        self.clock = RateClock(None)
        self.versions = itertools.count()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Sink

    def do_PUT(self) -> None:
        path, size = urllib.parse.urlsplit(self.path).path, int(self.headers.get("Content-Length") or 0)
        if path in ("/shut", "/open", "/keep"):
            self.server.is_shut, self.server.keeps_all = path == "/shut", path == "/keep" or self.server.keeps_all
            self._answer(200)
            return
        if path.startswith("/cap/"):
            self.server.clock.change(float(path.removeprefix("/cap/")) or None)
            self._answer(200)
            return
        if self.server.is_shut and size >= KEPT_BYTES:  # before it is sent, or the way would be measured
            self.close_connection = True
            self._answer(503, error="SlowDown")
            return
        data = self._received(size)
        with self.server.lock:
            there = self.server.objects.get(path)
            wanted = self.headers.get("If-Match")
            lost = (self.headers.get("If-None-Match") == "*" and there is not None) or (
                wanted is not None and (there is None or there[2] != wanted)
            )
            if not lost:
                etag = f'"{next(self.server.versions):032x}"'
                self.server.objects[path] = data, size, etag
                self.server.counters["put_bytes"] += size
        if lost:
            self._answer(412, error="PreconditionFailed")
        else:
            self._answer(200, etag=etag, checksum=self.headers.get(_CHECKSUM, ""))

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/counters":
            self._answer(200, json.dumps(self.server.counters).encode())
            return
        query = dict(urllib.parse.parse_qsl(url.query))
        if "list-type" in query:
            self._list(url.path, query.get("prefix", ""))
            return
        there = self.server.objects.get(url.path)
        if there is None:
            self._answer(404, error="NoSuchKey")
            return
        data, size, etag = there
        if len(data) != size and self.command == "GET":
            self._answer(500, error="InternalError")  # it was not kept
            return
        begins, ends = 0, size
        if said := self.headers.get("Range"):
            first, _, last = said.removeprefix("bytes=").partition("-")
            begins, ends = int(first), min(size, int(last) + 1)
        self.server.counters["get_bytes"] += ends - begins if self.command == "GET" else 0
        content_range = f"bytes {begins}-{ends - 1}/{size}" if said else ""
        self._answer(
            206 if said else 200, data[begins:ends], etag=etag, size=ends - begins, content_range=content_range
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Deletes what its body names."""
        path = urllib.parse.urlsplit(self.path).path.rstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        keys = [html.unescape(key) for key in re.findall("<Key>(.*?)</Key>", body)]
        with self.server.lock:
            for key in keys:
                self.server.objects.pop(f"{path}/{key}", None)
        rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._answer(200, f"{_XML}<DeleteResult>{rows}</DeleteResult>".encode())

    def _list(self, bucket: str, prefix: str) -> None:
        root = bucket.rstrip("/") + "/"
        with self.server.lock:
            found = sorted((path, each) for path, each in self.server.objects.items() if path.startswith(root + prefix))
        rows = "".join(
            f"<Contents><Key>{escape(path.removeprefix(root))}</Key><Size>{size}</Size><ETag>{escape(etag)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path, (_, size, etag) in found
        )
        body = f"{_XML}<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>{rows}"
        self._answer(200, f"{body}</ListBucketResult>".encode())

    def _received(self, size: int) -> bytes | memoryview:
        if size < KEPT_BYTES:
            return self.rfile.read(size)
        if self.server.keeps_all:
            data = memoryview(bytearray(size))
            at = 0
            while at < size:
                at += self.rfile.readinto(data[at:])
            return data
        buffer = memoryview(bytearray(1 << 20))
        while size:
            count = self.rfile.readinto(buffer[: min(size, len(buffer))])
            with self.server.lock:
                may_move_at = self.server.clock.book(count, time.monotonic())
            time.sleep(max(0.0, may_move_at - time.monotonic()))
            size -= count
        return b""

    def _answer(
        self,
        status: int,
        data: bytes | memoryview = b"",
        *,
        etag: str = "",
        error: str = "",
        size: int | None = None,
        content_range: str = "",
        checksum: str = "",
    ) -> None:
        if error:
            data = f"{_XML}<Error><Code>{error}</Code><Message>no</Message></Error>".encode()
            size = None
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (("ETag", etag), ("Content-Range", content_range), (_CHECKSUM, checksum)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def main() -> None:
    sink = Sink()
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{sink.server_address[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
