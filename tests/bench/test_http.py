"""Heads, and where bodies end."""

from __future__ import annotations

import pytest

from bench.http import HEAD_BYTES_MAX, Chunked, Sized, parse_head, response_body


def test_a_head_is_read_once_its_end_is_there() -> None:
    data = b"GET /bucket/key HTTP/1.1\r\nHost: a:1\r\nRANGE:  bytes=0-9 \r\n\r\nrest"
    assert parse_head(data[:-6]) is None
    head = parse_head(data)
    assert head is not None
    assert (head.first, head.second) == ("GET", "/bucket/key")
    assert head.headers == {"host": "a:1", "range": "bytes=0-9"}
    assert data[head.byte_count :] == b"rest"


def test_what_is_no_head_is_refused() -> None:
    with pytest.raises(ConnectionError, match="no end of a head"):
        parse_head(b"a" * (HEAD_BYTES_MAX + 1))
    with pytest.raises(ConnectionError, match="not HTTP"):
        parse_head(b"hello\r\n\r\n")


@pytest.mark.parametrize(
    ("head", "method", "length"),
    [
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 7\r\n\r\n", "GET", 7),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "HEAD", 0),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "GET", 0),
    ],
)
def test_a_body_of_known_length(head: bytes, method: str, length: int) -> None:
    parsed = parse_head(head)
    assert parsed is not None
    body = response_body(parsed, method)
    assert isinstance(body, Sized)
    assert body.left == length


def test_a_body_without_an_end_is_refused() -> None:
    head = parse_head(b"HTTP/1.0 200 OK\r\n\r\n")
    assert head is not None
    with pytest.raises(ConnectionError, match="how its body ends"):
        response_body(head, "GET")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_chunked_body_ends_with_its_trailer(step: int) -> None:
    data = b"5\r\nhello\r\n10;extension\r\n0123456789abcdef\r\n0\r\nName: value\r\n\r\n"
    body = Chunked()
    payload = 0
    for begin in range(0, len(data), step):
        assert not body.done
        payload += body.feed(data[begin : begin + step])
    assert body.done
    assert payload == 21
