"""As much of HTTP/1.1 as a proxy has to read: heads, and where a body ends.

A body is of known length or chunked; both have `feed`, which takes the next bytes and says how many of them are
payload, and `done`. Only one of known length can be spliced. A body that lasts until the connection closes, as HTTP/1.0
had it, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES_MAX = 64 << 10


class Sized:
    """A body of `left` bytes, none of which anybody has to look at."""

    def __init__(self, left: int) -> None:
        self.left = left

    @property
    def done(self) -> bool:
        """Whether it has passed in full."""
        return self.left == 0

    def feed(self, data: bytes) -> int:
        """The next bytes; never more than `left`, since a client asks again only after a whole response."""
        if len(data) > self.left:
            raise ConnectionError(f"{len(data) - self.left} bytes after the end of a response")
        self.left -= len(data)
        return len(data)


class Chunked:
    """Transfer-Encoding: chunked. Followed just far enough to see its end."""

    def __init__(self) -> None:
        self.done = False
        self._line = b""
        self._left = 0  # of the chunk, its line end included
        self._in_trailer = False

    def feed(self, data: bytes) -> int:
        """The next bytes; how many of them are payload."""
        position = payload = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                payload += max(0, min(step, self._left - 2))
                self._left -= step
                position += step
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                break
            self._end_of_line(self._line + data[position:end])
            self._line, position = b"", end + 1
        return payload

    def _end_of_line(self, line: bytes) -> None:
        line = line.strip()
        if self._in_trailer:
            self.done = not line
            return
        size = int(line.split(b";")[0], 16)
        self._in_trailer = size == 0
        self._left = size + 2 if size else 0


Body = Sized | Chunked


@dataclass(frozen=True, slots=True)
class Head:
    """A request's or response's head. `first` and `second` are the words it starts with: method and target, or
    version and status. Header names are lower case.
    """

    first: str
    second: str
    headers: dict[str, str]
    byte_count: int


def parse_head(data: bytes) -> Head | None:
    """The head that `data` starts with, or None where its end has not come yet; ConnectionError for no such thing."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > HEAD_BYTES_MAX:
            raise ConnectionError(f"no end of a head in {len(data)} bytes")
        return None
    lines = data[:end].decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) < 2:
        raise ConnectionError(f"not HTTP: {lines[0][:80]!r}")
    fields = (line.partition(":") for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    return Head(words[0], words[1], headers, end + 4)


def response_body(head: Head, method: str) -> Body:
    """How the body of a response to `method` ends."""
    if method == "HEAD" or head.second in ("204", "304") or head.second.startswith("1"):
        return Sized(0)
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        return Chunked()
    if "content-length" not in head.headers:
        raise ConnectionError("a response whose head does not say how its body ends")
    return Sized(int(head.headers["content-length"]))
