"""The page's real process beside a real service, over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastload.client.cache import Handle
from fastload.errors import CacheError, ConfigError, ServiceError
from fastload.page import Running, running, start
from fastload.page.guard import HEADERS
from fastload.page.listener import listen
from fastload.page.process import command
from tests.page.conftest import Page, StartPage, ended
from tests.patience import PATIENCE_S
from tests.processes import is_running, kill_service, until
from tests.programs import run_cli

STREAMS_MOST = 16
HOSTILE = {
    "markup": "<img src=x onerror=alert(1)>",
    "script": "</script><script>alert(1)</script>",
    "direction": "\u202e\u2066txet desrever",
    "long": "x" * 10_000,
}


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """What a stream sends: the kind, and the value. It ends after some minutes: what waits in vain, too."""
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    kind = ""
    deadline = time.monotonic() + PATIENCE_S
    while (line := response.readline().decode()) and time.monotonic() < deadline:
        name, _, value = line.rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


def views(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    return (value for kind, value in events(response) if kind == "view")


def test_live_figures_arrive_and_come_again_when_the_service_was_killed(
    page: Page, handle: Handle, directory: Path
) -> None:
    with page.get("events") as stream:
        shown = views(stream)
        assert "no cache service runs" in next(shown)["why"]
        with handle.consumer(name="first") as consumer:
            consumer.report(rank=3)
            found = next(view for view in shown if [rank["rank"] for rank in view["ranks"]] == [3])
            service = found["node"]["pid"]
            assert found["ranks"][0]["name"] == "first"
            kill_service(directory)
            # The consumer starts another one.
            found = next(view for view in shown if view["node"] is not None and view["node"]["pid"] != service)
            assert found["why"] == ""


def test_points_of_the_last_hour_come_first(page: Page, handle: Handle) -> None:
    with handle.consumer(name="first"), page.get("events") as stream:
        shown = events(stream)
        kind, columns = next(shown)
        assert (kind, columns) == ("points", {"at": [], "ram": [], "disk": [], "store": [], "fetched": []})
        later = next(columns for kind, columns in shown if kind == "points")
        assert len(later["at"]) == 1
        assert later["ram"] == [0.0]
        with page.get("events") as other:
            assert next(events(other))[1]["at"][0] == later["at"][0]


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_is_data(page: Page, handle: Handle, name: str) -> None:
    with handle.consumer(name=name), page.get("events") as stream:
        shown = next(rank["name"] for view in views(stream) for rank in view["ranks"])
        assert shown == name if len(name) < 100 else name.startswith(shown[:-1])
        assert len(shown) <= 300


def test_every_file_is_there_with_the_headers(page: Page) -> None:
    kinds = {"": "text/html", "page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
    kinds |= {"uplot/uPlot.iife.min.js": "text/javascript", "uplot/uPlot.min.css": "text/css"}
    for name, kind in kinds.items():
        with page.get(name) as response, page.get(name, "HEAD") as head:
            assert response.status == head.status == 200
            assert response.headers["Content-Type"].split(";")[0] == kind
            assert {header: response.headers[header] for header in HEADERS} == HEADERS
            assert not [header for header in response.headers if header.lower().startswith("access-control")]
            assert "Server" not in response.headers
            assert len(response.read()) > 100
            assert head.read() == b""
    for name in ("nothing", "../page.html", "page.html", "uplot/SHA256SUMS", "%2e%2e/app.py", "uplot/../../app.py"):
        with page.get(name) as response:
            assert response.status == 404, name
            assert {header: response.headers[header] for header in HEADERS} == HEADERS
    with page.get("events", "HEAD") as response:
        assert response.status == 200


ROUTES = ["/", "", "page.js", "events", "nothing"]


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_is_open_to_others(page: Page, route: str) -> None:
    path, cookie = route if route == "/" else page.path + route, {"Cookie": page.cookie}
    refused = [
        page.request("GET", path, cookie, host="rebound.example"),
        page.request("GET", path, cookie, host=f"rebound.example:{page.at.listen.rpartition(':')[2]}"),
        page.request("GET", path, cookie, host=f"x/{page.at.host}"),
        page.request("GET", path, {**cookie, "Sec-Fetch-Site": "cross-site"}),
        page.request("GET", path, {**cookie, "Sec-Fetch-Site": "same-site"}),
        page.request("GET", path),
        page.request("GET", path, {"Cookie": "fastload=wrong"}),
        page.request("GET", f"{path}?token=wrong", cookie),
        page.request("GET", f"http://{page.at.host}{path}", {"Cookie": "fastload=wrong"}),
    ]
    assert [response.status for response in refused] == [403] * len(refused)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "QUERY"):
        with page.request(method, path, cookie) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET, HEAD"
            assert {header: response.headers[header] for header in HEADERS} == HEADERS
    for response in refused:
        assert {header: response.headers[header] for header in HEADERS} == HEADERS
        assert "Set-Cookie" not in response.headers
        assert page.at.token.encode() not in response.read()
        response.close()


def test_a_host_header_that_is_missing_or_twice_is_refused(page: Page) -> None:
    host, _, port = page.at.listen.rpartition(":")
    asked = f"GET {page.path} HTTP/1.1\r\nCookie: {page.cookie}\r\nConnection: close\r\n"
    for hosts in ("", f"Host: {page.at.host}\r\nHost: rebound.example\r\n"):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
            sock.sendall(f"{asked}{hosts}\r\n".encode())
            reply = sock.makefile("rb").readline()
        assert reply.split()[1] in (b"400", b"403"), reply


def reply_to(request: bytes, host: str, port: int) -> bytes:
    """The first line that comes back; nothing where it was not worth one."""
    with socket.create_connection((host, port), timeout=PATIENCE_S) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request)  # need not be read to its end
        return sock.makefile("rb").readline()
    return b""


def test_nonsense_is_refused_and_fills_no_log(directory: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    with started(directory) as found:
        host, _, port = found.listen.rpartition(":")
        for nonsense in (b"\x16\x03\x01\x02", b"GET", b"GET / HTTP/1.1\r\nHost: " + b"x" * 200_000, b"\0" * 5000):
            assert not reply_to(nonsense + b"\r\n\r\n", host, int(port)).startswith(b"HTTP/1.1 2")
        assert (directory / "page.log").read_text() == ""


def test_the_seventeenth_stream_waits_for_another_to_end(page: Page) -> None:
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(page.get("events")) for _ in range(STREAMS_MOST)]
        for stream in streams:
            assert next(events(stream))[0] == "points"
        with page.get("events") as one_more:
            assert one_more.status == 503
            assert one_more.headers["Retry-After"]
        with page.get("page.css") as response:
            assert response.status == 200
        streams[0].close()

        def is_free() -> bool:
            with page.get("events") as stream:
                return stream.status == 200

        until(is_free)


def test_a_slow_reader_makes_nothing_grow_and_holds_up_nobody(page: Page, handle: Handle) -> None:
    host, _, port = page.at.listen.rpartition(":")
    with contextlib.ExitStack() as stack:
        consumers = [stack.enter_context(handle.consumer(name="x" * 300)) for _ in range(20)]
        assert consumers
        for _ in range(STREAMS_MOST - 1):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            asked = f"GET {page.path}events HTTP/1.1\r\nHost: {page.at.host}\r\nCookie: {page.cookie}\r\n\r\n"
            sock.sendall(asked.encode())  # and reads nothing
        with page.get("events") as stream:
            shown = (view["why"] for view in views(stream))
            assert "" in shown  # the page may have looked last before there was a service
            for _ in range(5):
                assert next(shown) == ""
    page.process.terminate()
    assert ended(page)


def test_a_second_page_is_refused_and_says_where_the_first_is(page: Page, directory: Path) -> None:
    again = subprocess.run(command(directory), capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 1
    assert "has a page already; `fastload status --open` prints its address" in again.stderr
    assert start(directory).pid == page.process.pid


def test_the_token_is_for_the_user_only(page: Page, directory: Path) -> None:
    assert page.at.token not in Path(f"/proc/{page.process.pid}/cmdline").read_text()
    assert page.at.token not in Path(f"/proc/{page.process.pid}/environ").read_text()
    assert stat.S_IMODE((directory / "page.json").stat().st_mode) == 0o600
    page.process.terminate()
    assert ended(page)
    assert (directory / "page.json").read_text() == ""
    assert running(directory) is None


def test_what_a_killed_page_left_is_not_trusted(start_page: StartPage, directory: Path) -> None:
    page = start_page()
    page.process.kill()
    page.process.wait()
    assert page.at.token in (directory / "page.json").read_text()
    assert running(directory) is None
    other = start_page()
    assert other.at.token != page.at.token


@contextlib.contextmanager
def started(directory: Path, **options: Any) -> Iterator[Running]:
    """A page in the background, until the block ends."""
    found = start(directory, **options)
    try:
        yield found
    finally:
        os.kill(found.pid, signal.SIGTERM)
        until(lambda: not is_running(found.pid))


def test_in_the_background(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    monkeypatch.chdir(directory.parent)
    with started(Path(directory.name)) as found:
        assert found == running(directory)
        assert found.url == f"http://{found.listen}/?token={found.token}"
        assert "PLANTED" not in Path(f"/proc/{found.pid}/environ").read_text()
        assert os.readlink(f"/proc/{found.pid}/cwd") == "/"
        assert found.token not in (directory / "page.log").read_text()


def test_it_ends_when_no_browser_comes(directory: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    process = subprocess.run(command(directory, idle_s=0.5), capture_output=True, text=True, timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "no browser was connected" in process.stderr


def test_two_that_are_started_at_once_are_one(directory: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    with ThreadPoolExecutor() as pool, started(directory) as one:
        assert list(pool.map(lambda _: start(directory), range(2))) == [one] * 2
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: start(directory), range(2))
    with started(directory) as found:
        assert first == second == found


def test_it_ends_with_its_standard_input(directory: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    process = subprocess.Popen(
        command(directory, ends_with_stdin=True), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the page is at 127.0.0.1:")
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0


def test_a_unix_socket_is_for_this_user_only(start_page: StartPage, tmp_path: Path) -> None:
    path = tmp_path / "page.sock"
    page = start_page(listen_at=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert page.at.url == f"http://localhost:8090/?token={page.at.token}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(
            f"GET /?token={page.at.token} HTTP/1.1\r\nHost: localhost:8090\r\nConnection: close\r\n\r\n".encode()
        )
        assert b"303 See Other" in sock.makefile("rb").readline()
    page.process.kill()
    page.process.wait()
    other = start_page(listen_at=f"unix:{path}")  # over what the first one left
    other.process.terminate()
    assert ended(other)
    assert not path.exists()


def test_a_reader_that_takes_nothing_is_disconnected_by_the_kernel() -> None:
    """In half a minute, which a test does not wait for; a connection inherits that."""
    with contextlib.closing(listen("127.0.0.1:0", [])) as place, socket.create_connection(place.sock.getsockname()):
        accepted, _ = place.sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 1 << 20


def test_other_addresses_need_names(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"listen='0.0.0.0:8090' is reached by other machines; .*--host="):
        listen("0.0.0.0:8090", [])
    place = listen("0.0.0.0:0", ["Node7:8090"])
    try:
        assert place.hosts == {"node7:8090"}
        assert place.host == "node7:8090"
    finally:
        place.close()


@pytest.mark.parametrize(
    "text", ["8090", "", "127.0.0.1", "127.0.0.1:99999", "http://127.0.0.1:8090", "::1:8090", "a b"]
)
def test_where_it_cannot_listen(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be HOST:PORT such as '127.0.0.1:8090', or unix:PATH"):
        listen(text, [])


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    for text in ("127.0.0.1:0", f"unix:{tmp_path}/socket"):
        with contextlib.closing(listen(text, [])) as place:
            taken = rf"cannot listen at {re.escape(place.listen)}: Address already in use; name another (port|path)"
            with pytest.raises(ServiceError, match=taken):
                listen(place.listen, [])
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ServiceError, match="Address already in use"):
        listen(f"unix:{file}", [])
    assert file.read_text() == "mine"


def test_without_a_directory(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    assert running(tmp_path / "nowhere") is None
    with pytest.raises(CacheError, match=r"there is no cache directory .*nowhere; jobs make it, or `fastload daemon`"):
        start(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_foreign_directory_is_refused(directory: Path) -> None:
    os.chmod(directory, 0o777)
    for call in (running, start):
        with pytest.raises(CacheError, match="may be written by others"):
            call(directory)


def test_without_the_extra(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "starlette.py").write_text("raise ModuleNotFoundError('no', name='starlette')")
    found = subprocess.run(
        command(directory),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "shadow")},
    )
    assert found.returncode == 1
    assert found.stderr == "fastload: ConfigError: the page needs starlette: pip install 'fastload[page]'\n"


def test_it_starts_no_service(page: Page, directory: Path) -> None:
    with page.get("events") as stream:
        assert "no cache service runs for" in next(views(stream))["why"]
    assert not (directory / "socket").exists()


def test_status_open_starts_one_page_and_prints_its_address(directory: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    shown = run_cli("status", "--open", "--cache", directory)
    with started(directory) as found:
        assert shown.stdout == f"{found.url}\n"
        assert shown.stderr == ""
        again = json.loads(run_cli("status", "--open", "--json", "--cache", directory).stdout)
        assert again == {"url": found.url, "listen": found.listen, "pid": found.pid}
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(found.url) as page:
            assert page.status == 200
            assert found.token not in page.url


def test_status_open_without_a_cache_makes_none(tmp_path: Path) -> None:
    shown = run_cli("status", "--open", "--cache", tmp_path / "nowhere", check=False)
    assert shown.returncode == 1
    assert "there is no cache directory" in shown.stderr
    assert not (tmp_path / "nowhere").exists()
