"""Metrics over HTTP, a Unix socket and a file, of services that run, are killed, or are not there."""

from __future__ import annotations

import http.client
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs fastload[metrics]")

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import fastload
from fastload.metrics import Serving, serve
from fastload.metrics.serving import readiness
from fastload.snapshot import Job
from tests.patience import PATIENCE_S
from tests.processes import kill_service, service_pids, until
from tests.programs import Program
from tests.snapshots import example, make


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Of a service in this process, with a consumer."""
    with (
        fastload.Cache(tmp_path / "cache", ram_bytes="32MiB", disk_bytes=0, service="inprocess") as cache,
        cache._handle.consumer(name="train"),
    ):
        yield tmp_path / "cache"


def connection(address: str) -> http.client.HTTPConnection:
    """To where metrics are served."""
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        return http.client.HTTPConnection(host.strip("[]"), int(port), timeout=PATIENCE_S)
    found = http.client.HTTPConnection("localhost", timeout=PATIENCE_S)
    found.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.sock.connect(address.removeprefix("unix:"))
    return found


def ask(serving: Serving, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    assert serving.address is not None
    asked = connection(serving.address)
    try:
        asked.request(method, path, headers=headers)
        reply = asked.getresponse()
        return reply.status, reply.read().decode(), reply.headers
    finally:
        asked.close()


def values(text: str) -> dict[str, float]:
    """Of metrics without labels."""
    return {each.name: each.samples[0].value for each in parse(text) if each.samples and not each.samples[0].labels}


def threads(name: str) -> list[threading.Thread]:
    """Those of this process that are called so."""
    return [each for each in threading.enumerate() if name in each.name]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "unix:"])
def test_metrics_of_a_service(directory: Path, tmp_path: Path, listen: str) -> None:
    socket_path = tmp_path / "metrics.sock"
    if listen == "[::1]:0" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serve(directory, f"unix:{socket_path}" if listen == "unix:" else listen) as serving:
        code, text, headers = ask(serving, "/metrics")
        assert code == 200
        assert headers["Content-Type"].startswith("text/plain")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert values(text)["fastload_consumers"] == 1
        accept = "application/openmetrics-text;version=1.0.0"
        code, text, headers = ask(serving, "/metrics", Accept=accept)
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        assert any(each.name == "fastload_up" for each in parse_openmetrics(text))
        if listen == "unix:":
            assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert not socket_path.exists()


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_the_cache_may_be_given_as_an_object_or_by_the_environment(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(fastload.Cache(directory), "127.0.0.1:0") as serving:
        assert values(ask(serving, "/metrics")[1])["fastload_up"] == 1
    monkeypatch.setenv("FASTLOAD_CACHE", str(directory))
    with fastload.metrics.serve(listen="127.0.0.1:0") as serving:
        assert values(ask(serving, "/metrics")[1])["fastload_up"] == 1


def test_without_a_service_nothing_is_made(tmp_path: Path) -> None:
    with serve(tmp_path / "nowhere", "127.0.0.1:0") as serving:
        code, text, _ = ask(serving, "/metrics")
        assert (code, values(text)) == (200, {"fastload_up": 0})
        for path in ("/healthz", "/readyz", "/readyz?data=train"):
            code, text, _ = ask(serving, path)
            assert code == 503
            assert f"no cache service runs for {tmp_path / 'nowhere'}" in text
    assert list(tmp_path.iterdir()) == []


def test_health_and_readiness(directory: Path) -> None:
    with serve(directory, "127.0.0.1:0") as serving:
        assert ask(serving, "/healthz")[:2] == (200, "ok\n")
        assert ask(serving, "/readyz")[:2] == (200, "ok\n")
        code, text, _ = ask(serving, "/readyz?data=no%20such%0Aset")
        assert (code, text) == (503, "no job warms 'no such\\nset'; those that are warmed: none\n")


@pytest.mark.parametrize(
    ("names", "is_ready", "says"),
    [
        ([], True, "ok"),
        (["done"], True, "ok"),
        (["under way"], False, "under way: warming, 1.0 KiB of 2.0 KiB held"),
        (["done", "under way"], False, "under way: warming"),
        (["failed"], False, "failed: failed, 0 B of 2.0 KiB held, no room"),
        (["other"], False, "no job warms 'other'; those that are warmed: done, failed, under way"),
    ],
)
def test_a_data_set_is_ready_when_its_job_is_done(names: list[str], is_ready: bool, says: str) -> None:
    jobs = [
        make(Job, name="done", state="done"),
        make(Job, name="under way", state="warming", held_bytes=1024, total_bytes=2048),
        make(Job, name="failed", state="failed", total_bytes=2048, error="no room"),
    ]
    found = readiness(example(jobs=jobs), names)
    assert found[0] == is_ready
    assert found[1].startswith(says)


def test_only_reading_is_answered_and_only_to_this_machine(directory: Path) -> None:
    with serve(directory, "127.0.0.1:0") as serving:
        assert serving.address is not None
        port = serving.address.rpartition(":")[2]
        code, text, headers = ask(serving, "/metrics", "HEAD")
        assert (code, text) == (200, "")
        assert int(headers["Content-Length"]) > 1000
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"):
            assert ask(serving, "/metrics", method)[0] == 501
        for path in ("/", "/metrics/", "/metrics/../metrics", "/%6detrics", "*"):
            assert ask(serving, path)[0] == 404
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            "127.0.0.1:1",
            f"127.0.0.1.evil.example:{port}",
            "",
        ):
            for path in ("/metrics", "/healthz", "/readyz", "/other"):
                assert ask(serving, path, Host=host)[0] == 403
        for host in (f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert ask(serving, "/metrics", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"listen": "0.0.0.0:0"}, "can be reached from other machines"),
        ({"listen": "[::]:0"}, "can be reached from other machines"),
        ({"listen": "192.0.2.1:9432"}, "can be reached from other machines"),
        ({"listen": "9432"}, "no address with a port"),
        ({"listen": ":9432"}, "no address with a port"),
        ({"listen": "127.0.0.1:"}, "no address with a port"),
        ({"listen": "127.0.0.1:65536"}, "no address with a port"),
        ({"listen": "example.org:9432"}, "no address with a port"),
        ({"listen": "unix:"}, "names no socket"),
        ({"listen": "unix:/no/such/folder/x.sock"}, "No such file"),
        ({"listen": "unix:/tmp/" + "x" * 200}, "too long"),
        ({"listen": "192.0.2.1:9432", "allow_remote": True}, "name another address"),
        ({"listen": None}, "name where metrics are to be had"),
        ({"listen": None, "textfile": "metrics.txt"}, r"named \*\.prom"),
        ({"listen": None, "textfile": "/no/such/folder/x.prom"}, "cannot be written"),
        ({"listen": None, "textfile": "/tmp/x.prom", "textfile_every_s": 0}, "between 1 and 3600"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(fastload.ConfigError, match=says) as found:
        serve(tmp_path, **arguments)
    assert "\n" not in str(found.value)
    assert not threads("fastload-metrics") + threads("fastload-textfile")


def test_without_prometheus_client_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.metrics.serving.find_spec", lambda name: None)
    with pytest.raises(fastload.ConfigError, match=r"pip install 'fastload\[metrics\]'"):
        serve(tmp_path)


def test_other_machines_where_that_is_wanted(directory: Path) -> None:
    with serve(directory, "0.0.0.0:0", allow_remote=True) as serving:
        assert serving.address is not None
        port = int(serving.address.rpartition(":")[2])
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        asked.request("GET", "/metrics", headers={"Host": "node7.example:9432"})
        assert asked.getresponse().status == 200
        asked.close()


def test_an_address_that_is_taken(directory: Path, tmp_path: Path) -> None:
    with serve(directory, "127.0.0.1:0") as serving, pytest.raises(fastload.ConfigError, match="in use"):
        serve(directory, serving.address)
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as killed:  # it leaves its socket behind
        killed.bind(str(path))
    with serve(directory, f"unix:{path}") as serving:
        with pytest.raises(fastload.ConfigError, match="in use"):
            serve(directory, f"unix:{path}")
        assert ask(serving, "/healthz")[0] == 200
    path.write_text("a file of somebody's")
    with pytest.raises(fastload.ConfigError, match="in use"):
        serve(directory, f"unix:{path}")
    assert path.read_text() == "a file of somebody's"


def test_clients_that_say_nothing_do_not_keep_others_out_for_ever(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastload.metrics.serving._Handler.timeout", 0.5)
    with serve(directory, "127.0.0.1:0") as serving:
        assert serving.address is not None
        host, _, port = serving.address.rpartition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(40)]
        try:
            until(lambda: threads("process_request"))
            assert len(threads("process_request")) <= 16

            def is_answered() -> bool:
                try:
                    return ask(serving, "/healthz")[0] == 200
                except (http.client.HTTPException, OSError):  # turned away
                    return False

            until(is_answered)
        finally:
            for each in silent:
                each.close()
    until(lambda: not threads("process_request"))


def test_garbage_is_refused_and_does_no_harm(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(directory, "127.0.0.1:0") as serving:
        assert serving.address is not None
        host, _, port = serving.address.rpartition(":")
        for garbage in (
            b"\x00\xff" * 100 + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET /metrics HTTP/9.9\r\n\r\n",
            b"G" * 70000,
        ):
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                reply = sock.recv(1000)
            assert b" 200 " not in reply
        for accept in ("application/openmetrics-text;version=x", "text/plain;version=1.0.0;escaping=?", ",;=,"):
            assert ask(serving, "/metrics", Accept=accept)[0] == 200
        assert ask(serving, "/readyz?data=%ff&data&=x&%")[0] == 503
        assert ask(serving, "/healthz")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_file_is_replaced_whole_and_goes_with_its_writer(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "fastload.prom"
    path.parent.mkdir()
    with serve(directory, None, textfile=path, textfile_every_s=1) as serving:
        assert serving.address is None
        until(path.exists)
        first = path.stat().st_ino
        kept = path.open()
        until(lambda: path.stat().st_ino != first)
        assert values(kept.read())["fastload_up"] == 1  # the one before is whole still
        kept.close()
        assert [each.name for each in path.parent.iterdir() if not each.name.startswith("fastload.prom.")] == [
            path.name
        ]
    assert list(path.parent.iterdir()) == []


def test_a_file_that_cannot_be_written_is_said_once(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with serve(directory, None, textfile=folder / "x.prom", textfile_every_s=1):
        until((folder / "x.prom").exists)
        folder.rename(tmp_path / "elsewhere")
        until(lambda: "metrics cannot be written to" in caplog.text)
        (tmp_path / "elsewhere").rename(folder)
        (folder / "x.prom").unlink()
        until((folder / "x.prom").exists)
    assert caplog.text.count("metrics cannot be written to") == 1


SERVED = """
import os, sys
import fastload
serving = fastload.metrics.serve(sys.argv[1], "127.0.0.1:0", textfile=sys.argv[2])
print(serving.address, flush=True)
if os.fork() == 0:  # as a worker process is
    sys.stdin.readline()
    os._exit(0)
sys.stdin.readline()
if sys.argv[3] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["end", "kill"])
def test_the_address_goes_with_the_process_also_where_it_has_children(
    directory: Path, tmp_path: Path, how: str
) -> None:
    """Of which none keeps the port."""
    file = tmp_path / "x.prom"
    with Program(SERVED, directory, file, how) as program:
        address = program.stdout.readline().strip()
        until(file.exists)
        asked = connection(address)
        asked.request("GET", "/healthz")
        assert asked.getresponse().status == 200
        asked.close()
        os.kill(program.pid, 0)
        # One line is for the parent or the child, whichever reads first; the other sees the end.
        program.stdin.write("\n")
        program.stdin.close()
        program.wait()
        with serve(directory, address):
            pass
    assert file.exists() == (how == "kill")


JOB = """
import sys
import fastload
with fastload.Cache(sys.argv[1], ram_bytes="32MiB", disk_bytes=0) as cache:
    with fastload.open(sys.argv[2], cache) as file:
        print(len(file.read()), flush=True)
        sys.stdin.readline()
"""


def test_a_service_that_is_killed_is_down_until_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")
    (tmp_path / "data").write_bytes(bytes(1000))
    cache = tmp_path / "cache"
    with serve(cache, "127.0.0.1:0") as serving, Program(JOB, cache, tmp_path / "data") as program:
        assert program.stdout.readline() == "1000\n"
        first = values(ask(serving, "/metrics")[1])
        assert first["fastload_up"] == 1
        kill_service(cache)
        until(lambda: values(ask(serving, "/metrics")[1])["fastload_up"] == 1)  # the job starts another
        assert values(ask(serving, "/metrics")[1])["fastload_start_time_seconds"] > first["fastload_start_time_seconds"]
        program.stdin.write("\n")
        program.stdin.flush()
        until(lambda: not service_pids(cache))
        assert ask(serving, "/healthz")[0] == 503
