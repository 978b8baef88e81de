"""Writes that fail on the way: to the real store through a relay with faults, and to disks that do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import Buffer

from bench.chaos.store import certify
from fastload.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
    WriteConflictError,
)
from fastload.store import (
    Counters,
    ObjectInfo,
    RequestOptions,
    Retrying,
    RetryOptions,
    Store,
    StoreOptions,
    check_conditions,
    local,
    open_store,
)
from fastload.store.answers import Refusal
from fastload.store.local import LocalStore
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.store.servers import Handler, Relay, answer, server

SOON = RetryOptions(deadline_s=PATIENCE_S, delay_s=0.001, delay_s_max=0.01)
FAULTS = ["refused", "cut", "lost"]


@contextlib.contextmanager
def behind(relay: Relay, s3: Bucket, counters: Counters | None = None, **extra: str) -> Iterator[Store]:
    with server(relay) as there:
        options = replace(s3.options, endpoint_url=there.endpoint_url, extra=tuple(extra.items()))
        store = open_store(s3.url, options, RequestOptions(retry=SOON, counters=counters or Counters()))
        try:
            yield store
        finally:
            store.close()


def content(store: Store, url: str) -> bytes:
    info = store.head(url)
    out = bytearray(info.size)
    store.read_into(info, 0, memoryview(out))
    return bytes(out)


# Faults of the way


@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_is_tried_again(s3: Bucket, fault: str) -> None:
    relay, counters, url = Relay(s3.server.endpoint_url, [fault, fault]), Counters(), f"{s3.url}/a.bin"
    with behind(relay, s3, counters) as store:
        etag = store.put(url, b"x" * 100_000)
        assert store.head(url).etag == etag
        assert content(store, url) == b"x" * 100_000
    assert relay.puts == 3
    assert counters.values()["retries"] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_who_creates_wins_whatever_became_of_the_answer(s3: Bucket, fault: str) -> None:
    relay, url = Relay(s3.server.endpoint_url, [fault]), f"{s3.url}/manifest.json"
    with behind(relay, s3) as store:
        etag = store.put_if_absent(url, b"mine")
        assert store.head(url).etag == etag
        with pytest.raises(WriteConflictError):
            store.put_if_absent(url, b"more")
        assert content(store, url) == b"mine"


@pytest.mark.parametrize("fault", FAULTS)
def test_who_replaces_wins_whatever_became_of_the_answer(s3: Bucket, fault: str) -> None:
    relay, url = Relay(s3.server.endpoint_url, ["", fault]), f"{s3.url}/manifest.json"
    with behind(relay, s3) as store:
        first = store.put(url, b"old")
        assert first is not None
        second = store.put_if_match(url, b"new", first)
        assert store.head(url).etag == second != first
        assert content(store, url) == b"new"


@pytest.mark.parametrize("theirs", [b"their", b"theirs, of another size"])
def test_who_loses_after_faults_is_told_so(s3: Bucket, theirs: bytes) -> None:
    relay, url = Relay(s3.server.endpoint_url, ["refused", "cut"]), s3.put("manifest.json", theirs)
    with behind(relay, s3) as store:
        with pytest.raises(WriteConflictError, match="another has written it"):
            store.put_if_absent(url, b"mine!")
        assert content(store, url) == theirs


def test_what_is_there_before_any_fault_is_anothers_also_where_it_is_the_same(s3: Bucket) -> None:
    url = s3.put("manifest.json", b"same")
    with behind(Relay(s3.server.endpoint_url), s3) as store, pytest.raises(WriteConflictError):
        store.put_if_absent(url, b"same")


def test_of_eight_creators_one_wins_through_faults(s3: Bucket) -> None:
    faults = ["lost", "", "refused", "lost", "cut", "", "lost", "lost", "refused", "cut"]
    for turn in range(4):
        url, start = f"{s3.url}/{turn}/manifest.json", threading.Barrier(8)
        with behind(Relay(s3.server.endpoint_url, faults[turn:] + faults), s3) as store:

            def create(data: bytes, store: Store = store, url: str = url, start: threading.Barrier = start) -> bytes:
                start.wait(PATIENCE_S)
                with contextlib.suppress(WriteConflictError):
                    store.put_if_absent(url, data)
                    return data
                return b""

            with ThreadPoolExecutor(8) as pool:
                winners = [data for data in pool.map(create, [b"%d" % number for number in range(8)]) if data]
            assert winners == [content(store, url)]


def test_an_upload_may_take_longer_than_an_answer_may_be_silent(s3: Bucket) -> None:
    relay, url = Relay(s3.server.endpoint_url, ["slow"], slow_s=1.5), f"{s3.url}/a.bin"
    with behind(relay, s3, read_timeout="1s") as store:
        store.put(url, bytes(8 << 20))
    assert relay.puts == 1


class Careless(LocalStore):
    """Looks at conditions in part."""

    def __init__(self, ignored: str) -> None:
        self.ignored = ignored

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return self.put(url, data) if self.ignored == "If-None-Match" else super().put_if_absent(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        ignores = self.ignored == "If-Match" or (
            self.ignored == "If-Match where no object is" and not os.path.exists(url)
        )
        return self.put(url, data) if ignores else super().put_if_match(url, data, etag)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("way", ["plain", "tls", "tls and a policy"])
def test_over_tls_bytes_are_not_hashed_unless_the_bucket_wants_it(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    def takes(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        said.append(handler.headers["x-amz-content-sha256"])
        denied = way == "tls and a policy" and said[-1] == "UNSIGNED-PAYLOAD"
        answer(403 if denied else 200, b"", Content_Range="")(handler)

    both, authority = certify(tmp_path)
    extra = (("root_certificate", authority.read_text()),)
    with server(takes, certificate=both if way != "plain" else None) as options:
        store = ObjectStore("s3://b", replace(options, extra=extra))
        for _ in range(2):
            assert store.put_if_absent("s3://b/k", b"hello") == '"e"'
        store.close()
    hashed = hashlib.sha256(b"hello").hexdigest()
    unhashed = "UNSIGNED-PAYLOAD"
    assert said == {"plain": [hashed] * 2, "tls": [unhashed] * 2, "tls and a policy": [unhashed, hashed, hashed]}[way]
    assert ("refuses uploads without a hash" in caplog.text) == (way == "tls and a policy")


@pytest.mark.parametrize("ignored", ["If-None-Match", "If-Match", "If-Match where no object is"])
def test_a_store_that_ignores_a_condition_is_found_out(tmp_path: Path, ignored: str) -> None:
    with pytest.raises(ConfigError, match=f"ignores {ignored}[:,]"):
        check_conditions(Careless(ignored), str(tmp_path))
    assert not os.path.exists(tmp_path) or os.listdir(tmp_path) == []


def test_who_may_not_write_is_told_so(s3: Bucket) -> None:
    store = open_store(s3.url, s3.denied_options)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(AccessDeniedError, match=r"a\.bin.*access denied.*the request used the keys"):
            write(f"{s3.url}/a.bin", b"x")
    with pytest.raises(AccessDeniedError, match=r"a\.bin"):
        store.delete(f"{s3.url}/a.bin")
    store.close()


def test_a_store_that_is_away(s3: Bucket) -> None:
    gone = replace(s3.options, endpoint_url="http://127.0.0.1:9")
    store = ObjectStore(s3.url, gone)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StoreUnavailableError, match=r"a\.bin: cannot reach the store at http://127\.0\.0\.1:9"):
            write(f"{s3.url}/a.bin", b"x")
    with pytest.raises(StoreUnavailableError, match=r"a\.bin: cannot reach the store"):
        store.delete(f"{s3.url}/a.bin")
    store.close()


def test_no_bucket() -> None:
    with server(answer(404, b"<Error><Code>NoSuchBucket</Code></Error>", Content_Range="")) as options:
        store = ObjectStore("s3://b", options)
        for write in (
            lambda: store.put("s3://b/k", b""),
            lambda: store.put_if_match("s3://b/k", b"", '"e"'),
            lambda: store.delete("s3://b/k"),
        ):
            with pytest.raises(ObjectMissingError, match="no such bucket"):
                write()
        store.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [("AccessDenied", AccessDeniedError), ("InternalError", StoreUnavailableError), ("Odd", StoreError), ("", None)],
)
def test_what_became_of_what_was_to_be_deleted_is_in_the_answer(code: str, error: type[StoreError] | None) -> None:
    said = f"<Error><Key>k</Key><Code>{code or 'NoSuchKey'}</Code><Message>no</Message></Error>"
    with server(answer(200, f"<DeleteResult>{said}</DeleteResult>".encode(), Content_Range="")) as options:
        store = ObjectStore("s3://b", options)
        with pytest.raises(error, match="s3://b/k") if error else contextlib.nullcontext():
            store.delete("s3://b/k")
        store.close()


def test_s3_may_ask_for_the_same_again() -> None:
    busy = answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>", Content_Range="")
    with server(busy, answer(200, b"", ETag='"new"', Content_Range="")) as options:
        store = Retrying(ObjectStore("s3://b", options), SOON)
        assert store.put_if_match("s3://b/k", b"", '"old"') == '"new"'
        store.close()


def test_google_replaces_a_generation() -> None:
    """A number says which version is meant, and comes with each answer."""
    conditions: list[str | None] = []
    now = {"generation": "7", "ETag": '"seven"'}

    def google(handler: object) -> None:
        said = handler.headers.get("x-goog-if-generation-match")  # type: ignore[attr-defined]
        head = {"ETag": now["ETag"], "x-goog-generation": now["generation"], "Content-Range": ""}
        if handler.command == "PUT":  # type: ignore[attr-defined]
            conditions.append(said)
            if said != now["generation"]:
                return answer(412, b"", Content_Range="")(handler)  # type: ignore[arg-type]
        return answer(200, b"", **head)(handler)  # type: ignore[arg-type]

    with server(google) as there:
        token = (("google_bearer_token", "t"),)
        store = ObjectStore("gs://b", StoreOptions(endpoint_url=there.endpoint_url, extra=token))
        assert store.put_if_match("gs://b/k", b"", '"seven"') == '"seven"'
        with pytest.raises(WriteConflictError, match='was to be "six" and is "seven"'):
            store.put_if_match("gs://b/k", b"", '"six"')
        store.close()
    assert conditions == ["7"]


AZURE = ("az://c", (("account_name", "a"), ("account_key", "aw==")))
GOOGLE = ("gs://b", (("google_bearer_token", "t"),))


@pytest.mark.parametrize(("root", "extra"), [AZURE, GOOGLE], ids=["azure", "google"])
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (409, "BlobAlreadyExists", WriteConflictError),
        (412, "ConditionNotMet", WriteConflictError),
        (404, "ContainerNotFound", ObjectMissingError),
        (403, "AuthorizationFailure", AccessDeniedError),
        (503, "ServerBusy", StoreUnavailableError),
        (201, "", None),
    ],
)
def test_azure_and_google_keep_to_conditions(
    root: str, extra: tuple[tuple[str, str], ...], status: int, code: str, error: type[StoreError] | None
) -> None:
    """By answers as they give them; that they do is not tried here."""
    conditions: list[str | None] = []

    def answers(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        conditions.append(handler.headers.get("If-None-Match") or handler.headers.get("x-goog-if-generation-match"))
        answer(status, f"<Error><Code>{code}</Code></Error>".encode() if code else b"", Content_Range="")(handler)

    with server(answers) as there:
        store = ObjectStore(root, StoreOptions(endpoint_url=there.endpoint_url, extra=extra))
        with pytest.raises(error) if error else contextlib.nullcontext():
            assert store.put_if_absent(f"{root}/k", b"x") == '"e"'
        with pytest.raises(StoreError) if error else contextlib.nullcontext() as raised:
            store.put(f"{root}/k", b"x")
        assert error is None or not isinstance(raised.value, WriteConflictError)  # it had no condition
        if status in (403, 503):
            with pytest.raises(error or StoreError):
                store.delete(f"{root}/k")
        store.close()
    assert conditions[:2] == [{"az": "*", "gs": "0"}[root[:2]], None]


# Retries, with time passed in


class Uploads:
    """Each takes 100 seconds, and the first ones fail in the end."""

    def __init__(self, failures: int) -> None:
        self.left, self.now_s = failures, 0.0

    def now(self) -> float:
        return self.now_s

    def put(self, url: str, data: object) -> str | None:
        self.now_s += 100
        if self.left:
            self.left -= 1
            raise StoreUnavailableError(f"{url}: no")
        return "e"


def test_patience_with_an_upload_begins_when_it_fails() -> None:
    uploads = Uploads(1)
    store = Retrying(uploads, RetryOptions(deadline_s=60), sleep=lambda _: None, now=uploads.now)  # type: ignore[arg-type]
    assert store.put("s3://b/k", b"") == "e"
    uploads.left = 2
    with pytest.raises(StoreUnavailableError, match=r"gave up after 2 attempts in 100\.0 s"):
        store.put("s3://b/k", b"")


# Disks


class StopError(Exception):
    """The machine stops here."""


@pytest.mark.parametrize("write", ["put", "put_if_absent", "put_if_match"])
@pytest.mark.parametrize(
    "ends", [OSError(errno.ENOSPC, "No space left on device"), StopError()], ids=["error", "crash"]
)
def test_a_file_is_there_whole_or_not_at_all_whatever_fails(
    tmp_path: Path, write: str, ends: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of the write fails in turn; in a crash all that come after it, too."""
    succeeded = False
    for failing in range(30):
        folder = tmp_path / str(failing)
        folder.mkdir()
        path, store, steps = folder / "a.bin", LocalStore(), iter(range(1000))
        etag = store.put(str(path), b"old") or "" if write != "put_if_absent" else ""
        broken = False

        def breaking(name: str, failing: int = failing, steps: Iterator[int] = steps) -> Callable[..., object]:
            function = getattr(os, name)

            def step(*given: object, **more: object) -> object:
                nonlocal broken
                if next(steps) == failing or (broken and isinstance(ends, StopError)):
                    broken = True
                    raise ends
                return function(*given, **more)

            return step

        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "replace", "fstat", "unlink"):
                patch.setattr(local.os, name, breaking(name))
            rename = local._renamed_to_new
            patch.setattr(local, "_renamed_to_new", _step_of(breaking, rename, patch))
            arguments = (etag,) if write == "put_if_match" else ()
            try:
                getattr(store, write)(str(path), b"new" * 1000, *arguments)
                succeeded = not broken
            except (StoreUnavailableError, StopError):
                pass
        found = path.read_bytes() if path.exists() else None
        assert found in (b"new" * 1000, b"old" if write != "put_if_absent" else None)
        if not isinstance(ends, StopError):
            assert os.listdir(folder) in (["a.bin"], [])
        for leaving in folder.glob(".tmp-*"):
            assert str(leaving) in [info.url for info in store.list(str(folder) + "/")]
            store.delete(str(leaving))
        if succeeded:
            break
    assert succeeded
    assert failing >= 6


def _step_of(
    breaking: Callable[[str], Callable[..., object]], function: Callable[[str, str], bool], patch: pytest.MonkeyPatch
) -> Callable[..., object]:
    """Like a function of os."""
    patch.setattr(os, "renamed_to_new", function, raising=False)
    return breaking("renamed_to_new")


def test_bytes_and_name_are_synced_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace_, mkdir = os.fsync, os.replace, os.mkdir

    def named(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append("sync " + ("file" if "/.tmp-put-" in target else os.path.relpath(target, tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(local.os, "fsync", named)
    monkeypatch.setattr(local.os, "replace", lambda *names: (done.append("rename"), replace_(*names)))
    monkeypatch.setattr(local.os, "mkdir", lambda name: (mkdir(name), done.append(f"make {os.path.basename(name)}")))
    LocalStore().put(f"{tmp_path}/a/b/c.bin", b"x")
    assert done == ["make a", "sync .", "make b", "sync a", "sync file", "rename", "sync a/b"]


def test_file_systems_without_that_rename_take_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_renamed_to_new", lambda *_: False)
    store, url = LocalStore(), f"{tmp_path}/a.bin"
    etag = store.put_if_absent(url, b"first")
    assert store.head(url).etag == etag
    with pytest.raises(WriteConflictError):
        store.put_if_absent(url, b"second")
    assert os.listdir(tmp_path) == ["a.bin"]

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(local.os, "link", refuse)
    with pytest.raises(ConfigError, match="neither hard links nor a rename that replaces nothing"):
        store.put_if_absent(f"{tmp_path}/b.bin", b"x")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_file_systems_without_locks_replace_nothing_on_a_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store, url = LocalStore(), f"{tmp_path}/a.bin"
    etag = store.put(url, b"x")
    monkeypatch.setattr(local.fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="has no locks"):
        store.put_if_match(url, b"y", etag or "")
    assert Path(url).read_bytes() == b"x"


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name in ("file/below", "folder", "n" * 300):
        with pytest.raises(StoreError, match="no file can have this name"):
            LocalStore().put(f"{tmp_path}/{name}", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_folders_come_and_go_with_their_files(tmp_path: Path) -> None:
    """Who writes into one meanwhile makes it anew."""
    store = LocalStore()

    def churn(number: int) -> None:
        for _ in range(50):
            store.put(f"{tmp_path}/a/{number}.bin", b"x")
            store.delete(f"{tmp_path}/a/{number}.bin")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert os.listdir(tmp_path) == []


def test_a_listing_beside_writes(tmp_path: Path) -> None:
    """What is renamed or deleted between the folder's listing and the look at the file is left out."""
    store, stop = LocalStore(), threading.Event()
    store.put(f"{tmp_path}/stays.bin", b"x")

    def churn() -> None:
        while not stop.is_set():
            store.put(f"{tmp_path}/a.bin", b"x")
            store.delete(f"{tmp_path}/a.bin")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(churn)
        for _ in range(200):
            assert f"{tmp_path}/stays.bin" in [info.url for info in store.list(f"{tmp_path}/")]
        stop.set()
        writing.result(PATIENCE_S)


def test_refusals_of_writes_are_not_read_as_missing_credentials() -> None:
    assert isinstance(Refusal(403, "AccessDenied").error("s3://b/k", ""), AccessDeniedError)
    with server(answer(500, b"", Content_Range="")) as options:
        store = ObjectStore("s3://b", options)
        with pytest.raises(StoreUnavailableError, match="the store cannot serve it now"):
            store.put("s3://b/k", b"x")
        with pytest.raises(StoreUnavailableError, match="the store cannot serve it now"):
            store.delete("s3://b/k")
        store.close()


def test_of_what_was_found_the_size_decides_first() -> None:
    """An object of terabytes in the way is not read to be compared."""

    class Huge(Uploads):
        def put_if_absent(self, url: str, data: object) -> str | None:
            if self.left:
                self.left -= 1
                raise StoreUnavailableError(f"{url}: no")
            raise WriteConflictError(f"{url}: lost")

        def head(self, url: str) -> ObjectInfo:
            return ObjectInfo(url, 1 << 50, '"e"')

    store = Retrying(Huge(1), sleep=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(WriteConflictError, match="lost"):
        store.put_if_absent("s3://b/k", b"x")
