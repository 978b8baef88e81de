"""Replies that are not what was asked for, from real sockets, by all ways to a store: none of their bytes is taken."""

from __future__ import annotations

import io
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import fastload
from bench.chaos.store import certify
from fastload.errors import AccessDeniedError, ObjectChangedError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.store import Counters, ObjectInfo, RequestOptions, RetryOptions, Store, StoreOptions, open_store
from fastload.store.httpclient import _speaks
from fastload.store.replies import Reply, misfit, size_told
from tests.shards import tar_of
from tests.store.servers import Behaviour, Handler, Liar, answer, handed_out, server, whole

SIZE, START, LENGTH = 4096, 1000, 1000
DATA = random.Random(1).randbytes(SIZE)
PART = DATA[START : START + LENGTH]
RANGE = f"bytes {START}-{START + LENGTH - 1}/{SIZE}"
TIME, TIME_NS = "Tue, 01 Jan 2030 00:00:00 GMT", 1893456000 * 10**9
WAYS = ["direct", "proxied", "tls", "signed-url", "obstore", "http"]


@dataclass(frozen=True)
class Case:
    """A first reply, and what comes of it: "bad" (seen through, counted, retried), "cut" (retried as a connection that
    broke), or "taken". `looks`: whether a second look has to decide. `otherwise`: what comes of it by these ways.
    """

    lie: Behaviour
    outcome: str = "bad"
    looks: bool = False
    etag: str | None = '"e"'
    otherwise: dict[str, str] | None = None

    def outcome_by(self, way: str) -> str:
        return (self.otherwise or {}).get(way, self.outcome)


def part(body: bytes = PART, *again: tuple[str, str], **more: str) -> Behaviour:
    return answer(206, body, *again, **{"Content_Range": RANGE, **more})


def chunked(body: bytes) -> Behaviour:
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return part(framed, Content_Length="", Transfer_Encoding="chunked")


def until_the_end(body: bytes) -> Behaviour:
    def behave(handler: Handler) -> None:
        part(body, Content_Length="", Connection="close")(handler)
        handler.close_connection = True

    return behave


MULTIPART = b"--b\r\nContent-Range: " + RANGE.encode() + b"\r\n\r\n" + PART + b"\r\n--b--\r\n"
CASES = {
    "another range": Case(part(DATA[:LENGTH], Content_Range=f"bytes 0-{LENGTH - 1}/{SIZE}")),
    "a byte beside": Case(part(DATA[1001:2001], Content_Range=f"bytes 1001-2000/{SIZE}")),
    "a shorter range": Case(part(PART[:500], Content_Range=f"bytes 1000-1499/{SIZE}")),
    "a longer range": Case(part(DATA[1000:2500], Content_Range=f"bytes 1000-2499/{SIZE}")),
    "a range that its body is not": Case(part(PART[:500]), otherwise={"obstore": "cut"}),
    "no Content-Range": Case(part(Content_Range="")),
    "an unknown size": Case(part(Content_Range="bytes 1000-1999/*")),
    "a Content-Range that is none": Case(part(Content_Range=f"bytes 1000-/{SIZE}")),
    "another unit": Case(part(Content_Range=f"lines 1000-1999/{SIZE}")),
    "several parts": Case(answer(206, MULTIPART, Content_Range="", Content_Type="multipart/byteranges; boundary=b")),
    "another size": Case(part(Content_Range="bytes 1000-1999/5000"), looks=True),
    "another ETag": Case(part(ETag='"other"'), looks=True),
    "another time": Case(part(ETag="", Last_Modified="Wed, 01 Jan 2031 00:00:00 GMT"), looks=True, etag=None),
    "the whole object": Case(answer(200, DATA, Content_Range="")),
    "a whole object": Case(answer(200, DATA, Content_Range="", ETag='"other"'), looks=True),
    "an error page": Case(answer(200, b"<html>Sorry", Content_Range="", ETag="", Last_Modified=""), looks=True),
    "an error page of that length": Case(answer(200, bytes(LENGTH), Content_Range="", ETag=""), looks=True),
    "no content": Case(answer(204, b"", Content_Range="", Content_Length="")),
    "transformed": Case(answer(203, PART, Content_Range=RANGE)),
    "not modified": Case(answer(304, b"", Content_Range="")),
    "precondition failed": Case(answer(412, b"", Content_Range=""), looks=True),
    "not satisfiable": Case(answer(416, b"", Content_Range=f"bytes */{SIZE}"), looks=True),
    "not found": Case(answer(404, b"", Content_Range=""), looks=True),
    "two ranges": Case(part(PART, ("Content-Range", f"bytes 0-{LENGTH - 1}/{SIZE}")), otherwise={"obstore": "taken"}),
    "two ETags": Case(part(PART, ("ETag", '"other"')), otherwise={"obstore": "taken"}),
    "two lengths": Case(part(PART, ("Content-Length", "3")), otherwise={"obstore": "cut"}),
    "a length that is none": Case(part(Content_Length="many"), otherwise={"obstore": "cut"}),
    "a length that its body is not": Case(part(PART[:500], Content_Length=str(LENGTH)), outcome="cut"),
    "a body that ends early": Case(until_the_end(PART[:500]), outcome="cut", otherwise={"obstore": "bad"}),
    "a body that goes on": Case(until_the_end(PART + b"x")),
    "chunks that end early": Case(chunked(PART[:500]), outcome="cut", otherwise={"obstore": "bad"}),
    "chunks that go on": Case(chunked(PART + b"x")),
    "compressed on the way": Case(
        part(b"\x1f\x8b" + PART[:400], Content_Encoding="gzip"), otherwise={"obstore": "cut"}
    ),
    # What is odd, and right.
    "stored compressed": Case(part(Content_Encoding="gzip"), outcome="taken"),
    "a weak ETag": Case(part(ETag='W/"e"'), outcome="taken"),
    "no ETag": Case(part(ETag=""), outcome="taken"),
    "no time": Case(part(ETag="", Last_Modified=""), outcome="taken", etag=None),
    "the same range twice": Case(part(PART, ("Content-Range", RANGE)), outcome="taken"),
    # obstore wants to know how long a body is.
    "chunks": Case(chunked(PART), outcome="taken", otherwise={"obstore": "bad"}),
    "up to the end": Case(until_the_end(PART), outcome="taken", otherwise={"obstore": "bad"}),
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    return certify(tmp_path_factory.mktemp("tls"))


@dataclass
class World:
    """A store of one object, and its first reply."""

    store: Store
    info: ObjectInfo
    counters: Counters

    def read(self, start: int = START, length: int = LENGTH) -> bytes:
        out = bytearray(length)
        self.store.read_into(self.info, start, memoryview(out))
        return bytes(out)


@contextmanager
def opened(
    liar: Behaviour, way: str, request: pytest.FixtureRequest, *, etag: str | None = '"e"', deadline_s: float = 60.0
) -> Iterator[World]:
    """A store that is reached that way and asks `liar`."""
    both, authority = request.getfixturevalue("certificate") if way == "tls" else (None, None)
    with ExitStack() as stack:
        options = stack.enter_context(server(liar, certificate=both))
        url = "s3://b/a.tar"
        if way == "http":
            url, options = f"{options.endpoint_url}/a.tar", StoreOptions()
        elif way == "proxied":
            extra = (("proxy_url", str(options.endpoint_url)),)
            options = replace(options, endpoint_url="http://store.invalid", extra=extra)
        elif way == "tls":
            options = replace(options, extra=(("root_certificate", authority.read_text()),))
        elif way == "obstore":
            options = replace(options, extra=(("read_timeout", "30s"),))
        elif way == "signed-url":
            found = stack.enter_context(handed_out(request.getfixturevalue("tmp_path")))
            options = replace(found, endpoint_url=options.endpoint_url)
        counters = Counters()
        retry = RetryOptions(deadline_s=deadline_s, delay_s=0.001, delay_s_max=0.01)
        store = open_store(url, options, RequestOptions(retry=retry, counters=counters))
        try:
            yield World(store, ObjectInfo(url, SIZE, etag, TIME_NS), counters)
        finally:
            store.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_first_reply(name: str, way: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    outcome = case.outcome_by(way)
    truth = whole(DATA, case.etag or "")
    liar = Liar(case.lie, truth)
    with opened(liar, way, request, etag=case.etag) as world:
        assert world.read() == PART
        counted = world.counters.values()
    assert len(liar.lied_over) == 1
    assert counted["bad_replies"] == (outcome == "bad")
    assert counted["retries"] == (outcome != "taken")
    if outcome == "bad":
        assert not set(liar.used_after) & set(liar.lied_over)
        # What obstore says of a reply without a range does not tell whether it was of the version that was listed.
        assert bool(liar.second_looks) == case.looks or (way == "obstore" and not case.looks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answer(403, b"<Error><Code>AccessDenied</Code></Error>", Content_Range=""), AccessDeniedError),
        (answer(400, b"", Content_Range=""), StoreError),
    ],
    ids=["denied", "refused"],
)
def test_one_refusal_is_not_believed(
    reply: Behaviour, kind: type[StoreError], way: str, request: pytest.FixtureRequest
) -> None:
    liar = Liar(reply, whole(DATA))
    with opened(liar, way, request) as world:
        assert world.read() == PART
        if way == "signed-url":
            assert world.read() == PART
            assert len(liar.used_after) == 2  # of these none by obstore, which is for buckets that refuse such URLs
            assert len(set(liar.used_after)) == 1
    with opened(Liar(reply, whole(DATA), lies=10), way, request) as world, pytest.raises(kind, match=r"a\.tar"):
        world.read()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.looks and case.etag is not None])
def test_a_second_look_finds_another_version(name: str, way: str, request: pytest.FixtureRequest) -> None:
    liar = Liar(CASES[name].lie, whole(DATA[:-1] + b"x", '"new"'))
    with opened(liar, way, request) as world, pytest.raises(ObjectChangedError, match='its ETag was "e" and is "new"'):
        world.read()
    assert len(liar.lied_over) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_second_look_finds_nothing(way: str, request: pytest.FixtureRequest) -> None:
    gone = answer(404, b"", Content_Range="")
    with opened(Liar(gone, gone), way, request) as world, pytest.raises(ObjectMissingError, match=r"a\.tar"):
        world.read()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["another range", "the whole object", "another ETag", "a body that goes on"])
def test_a_bad_reply_that_stays(name: str, way: str, request: pytest.FixtureRequest) -> None:
    """It ends as the store being out of order, not as another version, and says what was asked for and what came."""
    with opened(Liar(CASES[name].lie, whole(DATA), lies=10**6), way, request, deadline_s=0.05) as world:
        with pytest.raises(StoreUnavailableError) as error:
            world.read()
        message = str(error.value)
        assert message.startswith(f"{world.info.url}: a bad reply")
        assert "requested bytes 1000-1999 of 4096" in message
        assert "received" in message.partition("requested")[2]
        assert "gave up after" in message
        counted = world.counters.values()
        assert counted["bad_replies"] == counted["retries"] + 1


@pytest.mark.parametrize("way", ["direct", "tls", "http"])
def test_the_whole_object_where_it_was_asked_for(way: str, request: pytest.FixtureRequest) -> None:
    with opened(Liar(answer(200, DATA, Content_Range=""), whole(DATA)), way, request) as world:
        assert world.read(0, SIZE) == DATA
        assert world.counters.values()["retries"] == 0


@pytest.mark.parametrize("way", ["direct", "tls", "http"])
def test_what_comes_behind_a_reply_is_no_reply(way: str, request: pytest.FixtureRequest) -> None:
    """A body longer than its Content-Length, in whose rest a whole reply stands."""
    smuggled = (
        f"HTTP/1.1 206 Partial Content\r\nContent-Length: {LENGTH}\r\nContent-Range: {RANGE}\r\n"
        f'ETag: "e"\r\nLast-Modified: {TIME}\r\n\r\n'
    ).encode() + bytes(LENGTH)

    def longer(handler: Handler) -> None:
        handler.wfile, socket_file = io.BytesIO(), handler.wfile
        part(PART)(handler)
        handler.wfile, written = socket_file, handler.wfile.getvalue()
        handler.wfile.write(written + smuggled)

    liar = Liar(longer, whole(DATA))
    with opened(liar, way, request) as world:
        assert world.read() == PART
        assert world.read() == PART
    assert not set(liar.used_after) & set(liar.lied_over)


def test_a_connection_that_speaks_unasked_is_not_used() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not _speaks(ours)
        theirs.send(b"HTTP/1.1 206 Partial Content\r\n")
        assert _speaks(ours)
        ours.recv(100)
        assert not _speaks(ours)
        theirs.close()
        assert _speaks(ours)


def test_samples_through_a_proxy_that_answers_with_other_ranges(tmp_path: Path) -> None:
    """Under honest heads: nothing is doubled or lost, neither now nor later from the cache."""
    samples = {f"{number:03}": {"bin": bytes([number]) * 3000} for number in range(100)}
    tar = tar_of(samples)
    chunk_bytes, truth, number = 64 << 10, whole(tar), iter(range(10**6))

    def lie(handler: Handler) -> None:
        wanted = handler.headers.get("Range", "")
        if wanted != "bytes=0-0" and next(number) % 3 == 0:
            start = 0 if not wanted.startswith("bytes=0-") else chunk_bytes
            handler.headers.replace_header("Range", f"bytes={start}-{start + chunk_bytes - 1}")
        truth(handler)

    with (
        server(lie) as options,
        fastload.Cache(tmp_path / "cache", ram_bytes="1MiB", disk_bytes="16MiB", chunk_bytes=chunk_bytes) as cache,
    ):
        bad_replies = []
        for _ in range(2):
            dataset = fastload.StreamingDataset(f"{options.endpoint_url}/a.tar", cache=cache, shuffle=False)
            loader = fastload.DataLoader(dataset, batch_size=10, num_workers=1)
            assert [sample for batch in loader for sample in batch["bin"]] == [each["bin"] for each in samples.values()]
            bad_replies.append(loader.stats()["bad_replies"])
            loader.close()
        assert bad_replies[0] > 0


def test_a_file_system_that_does_not_say_how_large_an_object_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "info", lambda self, path, **_: {"name": path, "size": None, "type": "file"})
    store = open_store("memory://unsized/a.tar", StoreOptions())
    with pytest.raises(StoreError, match=r"memory://unsized/a\.tar: its file system does not say how large it is"):
        store.head("memory://unsized/a.tar")
    store.close()


# Of what size, and what there is.


@pytest.mark.parametrize(
    ("behaviours", "size"),
    [
        ([answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(206, b"x", Content_Range="bytes 0-0/1")], 1),
        ([answer(200, b"x", Content_Range="")], 1),
        ([answer(200, b"", Content_Range="")], 0),
        ([answer(416, b"", Content_Range="bytes */0")], 0),
        ([answer(206, b"x", Content_Range="bytes 7-7/10"), answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(206, b"x", Content_Range="bytes 0-0/*"), answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(416, b"", Content_Range="bytes */9"), answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(404, b"", Content_Range=""), answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(403, b"", Content_Range=""), answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
        ([answer(200, b"<html>", Content_Range="")] * 2 + [answer(206, b"x", Content_Range="bytes 0-0/4096")], 4096),
    ],
)
def test_the_size_of_an_object_on_the_web(
    behaviours: list[Behaviour], size: int, request: pytest.FixtureRequest
) -> None:
    with server(*behaviours) as options:
        url = f"{options.endpoint_url}/a.tar"
        store = open_store(url, StoreOptions(), RequestOptions(retry=RetryOptions(delay_s=0.001)))
        assert store.head(url) == ObjectInfo(url, size, '"e"', TIME_NS)
        store.close()


def test_a_web_server_without_ranges() -> None:
    with server(answer(200, DATA, Content_Range="")) as options:
        url = f"{options.endpoint_url}/a.tar"
        store = open_store(url, StoreOptions())
        with pytest.raises(
            StoreError, match=rf"{url}: .*does not serve ranges.*200.*4096 bytes.*serve it from"
        ) as error:
            store.head(url)
        store.close()
    assert not isinstance(error.value, StoreUnavailableError)


def listing(*keys: str) -> Behaviour:
    found = "".join(
        f'<Contents><Key>{key}</Key><LastModified>2030-01-01T00:00:00.000Z</LastModified><ETag>"e"</ETag>'
        "<Size>5</Size></Contents>"
        for key in keys
    )
    text = f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>'
    return answer(200, text.encode(), Content_Range="")


@pytest.mark.parametrize(
    ("lie", "bad_replies"),
    [
        (answer(200, b"<html>Sorry</html>", Content_Range=""), 0),  # obstore takes it for a listing of nothing
        (answer(200, b"<Error><Code>InternalError</Code></Error>", Content_Range=""), 0),
        (answer(200, b"", Content_Range=""), 1),
        (listing("other/a.tar", "other/b.tar"), 1),
        (listing("d/a.tar", "x"), 1),
    ],
    ids=["a page", "an error", "nothing", "another prefix", "more than the prefix"],
)
def test_a_first_listing(lie: Behaviour, bad_replies: int) -> None:
    counters = Counters()
    with server(lie, listing("d/a.tar", "d/b.tar")) as options:
        retry = RetryOptions(delay_s=0.001)
        store = open_store("s3://b", options, RequestOptions(retry=retry, counters=counters))
        assert [info.url for info in store.list("s3://b/d/")] == ["s3://b/d/a.tar", "s3://b/d/b.tar"]
        store.close()
    assert counters.values()["bad_replies"] == bad_replies


# fsspec says nothing of replies, so what is there is asked for before and after.


@pytest.mark.parametrize("name", ["short", "long", "another object meanwhile"])
def test_what_fsspec_gives(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    url = f"memory://{request.node.name.partition('[')[0]}/a.tar"
    system.pipe_file(url, DATA)
    counters = Counters()
    store = open_store(url, StoreOptions(), RequestOptions(retry=RetryOptions(delay_s=0.001), counters=counters))
    info = store.head(url)
    kind, cat_file = type(system), type(system).cat_file
    calls = 0

    def lie(self: object, path: str, start: int, end: int) -> bytes:
        nonlocal calls
        calls += 1
        data: bytes = cat_file(self, path, start, end)
        if calls > 1:
            return data
        if name == "another object meanwhile":
            system.pipe_file(url, DATA[::-1] + b"x")
            data = cat_file(self, path, start, end)
        return data[:-1] if name == "short" else data + b"x" if name == "long" else data

    monkeypatch.setattr(kind, "cat_file", lie)
    out = bytearray(LENGTH)
    if name == "another object meanwhile":
        with pytest.raises(ObjectChangedError, match="its size was 4096 and is 4097"):
            store.read_into(info, START, memoryview(out))
    else:
        store.read_into(info, START, memoryview(out))
        assert bytes(out) == PART
        assert counters.values()["retries"] == 1
    store.close()


def test_an_etag_that_no_header_can_hold() -> None:
    """A listing may have anything in it. What cannot be sent is not, and then the time says which version it is."""
    with server(Liar(answer(500, b""), whole(DATA, ""), lies=0)) as options:
        store = open_store("s3://b", options)
        out = bytearray(LENGTH)
        for etag in ('"e\r\nX-Injected: 1"', '"\u2028"'):
            store.read_into(ObjectInfo("s3://b/a.tar", SIZE, etag, TIME_NS), START, memoryview(out))
            assert bytes(out) == PART
        store.close()


# The decision by itself.


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(206, 0, 10, 100, 10, '"e"'), None),
        (Reply(206, 0, 10, 100, None, '"e"'), None),
        (Reply(206, 0, 10, 100, 10, None), None),
        (Reply(206, 0, 10, 100, 9, '"e"'), StoreUnavailableError),
        (Reply(206, 0, 9, 100, 10, '"e"'), StoreUnavailableError),
        (Reply(206, 0, 10, None, 10, '"e"'), StoreUnavailableError),
        (Reply(206, None, None, 100, 10, '"e"'), StoreUnavailableError),
        (Reply(206, 0, 10, 99, 10, '"e"'), ObjectChangedError),
        (Reply(206, 0, 10, 100, 10, '"f"'), ObjectChangedError),
        (Reply(200, None, None, None, 100, '"e"'), StoreUnavailableError),
        (Reply(200, None, None, None, 10, '"e"'), ObjectChangedError),
        (Reply(200, 0, 10, 100, 100, '"e"'), StoreUnavailableError),
        (Reply(206, 0, 10, 100, 10, '"e"', 0, "two of ETag"), StoreUnavailableError),
        (Reply(100, 0, 10, 100, 10, '"e"'), StoreUnavailableError),
    ],
)
def test_the_decision(reply: Reply, kind: type[StoreError] | None) -> None:
    error = misfit(reply, ObjectInfo("s3://b/k", 100, '"e"'), 0, 10, "http://h")
    assert (error is None) if kind is None else isinstance(error, kind)


def test_huge_numbers_in_headers_are_no_numbers() -> None:
    digits = "9" * 30_000
    reply = Reply.of(206, [("Content-Range", f"bytes 0-9/{digits}"), ("Content-Length", "10")], 10)
    assert reply.contradiction
    assert len(str(reply)) < 300
    assert size_told(reply) is None
