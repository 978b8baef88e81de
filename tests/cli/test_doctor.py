"""`fastload doctor`: what it finds on real directories, services and stores, and what it leaves behind: nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import fastload
from bench.chaos.store import certify
from fastload.cli import checks, exits
from fastload.cli.checks import Check
from fastload.config import CacheLimits, memory_limit_bytes
from tests.conftest import Bucket
from tests.programs import run_cli
from tests.store.servers import answer, server


def doctor(*arguments: object, code: int = 0, **options: Any) -> dict[str, Check]:
    """What it finds, by name; the last of each."""
    done = run_cli("doctor", "--json", *arguments, check=False, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return {each["name"]: Check(**each) for each in json.loads(done.stdout)}


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_node_on_which_nothing_ran_is_well_and_stays_as_it_is(tmp_path: Path) -> None:
    found = doctor("--cache", tmp_path / "nowhere")
    assert {each.state for each in found.values()} <= {"ok", "warn"}
    assert {
        "versions",
        "packages",
        "kernels",
        "C unit",
        "descriptors",
        "memory",
        "directory",
        "service",
    } <= found.keys()
    assert "the first job makes it" in found["directory"].says
    assert files(tmp_path) == []


def test_each_line_has_its_state_and_no_control_characters(tmp_path: Path) -> None:
    done = run_cli("doctor", "/no\x1b[31m/such\u202efile", "--cache", tmp_path, check=False)
    assert done.returncode == exits.FAILED
    lines = done.stdout.splitlines()
    assert all(line[:6] in ("ok    ", "warn  ", "fail  ") for line in lines)
    assert all(line.isprintable() for line in lines)
    assert r"/no\x1b[31m/such\u202efile" in lines[-1]


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    fastload.Cache(tmp_path, ram_bytes="32MiB", disk_bytes="64MiB").close()
    before = files(tmp_path)
    found = doctor("--cache", tmp_path)
    assert found["disk rate"].state in ("ok", "warn")
    assert "/s written" in found["disk rate"].says
    assert "disk_bytes is 64.0 MiB" in found["room"].says
    assert found["memory"].says.startswith("ram_bytes is 32.0 MiB")
    assert files(tmp_path) == before


def test_a_running_service_answers_and_its_log_is_read(tmp_path: Path) -> None:
    with (
        fastload.Cache(tmp_path, ram_bytes="32MiB", disk_bytes=0, service="inprocess") as cache,
        cache._handle.consumer(),
    ):
        (tmp_path / "service.log").write_text("2026-01-01 00:00:00,000 7 INFO all is well\n")
        found = doctor("--cache", tmp_path)
        assert f"process {os.getpid()}, and answers in" in found["service"].says
        assert found["log"].state == "ok"
        (tmp_path / "service.log").write_text(
            "2026-01-01 00:00:00,000 7 WARNING https://user:geheim@host/ failed\x1b[31m\n"
        )
        found = doctor("--cache", tmp_path)
        assert found["log"].state == "warn"
        assert "https://***@host/ failed" in found["log"].says


def test_a_directory_that_others_may_write_to_fails_with_the_cure(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = doctor("--cache", tmp_path, code=exits.FAILED)
    assert found["service"].state == "fail"
    assert f"run chmod 700 {tmp_path}" in found["service"].says


def test_a_file_in_place_of_a_directory_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor("--cache", tmp_path / "file", code=exits.FAILED)
    assert found["directory"].says == f"{tmp_path / 'file'} is no directory"
    assert found["service"].state == "fail"


def test_limits_that_are_damaged_are_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "cache.json").write_text('{"format": 99}')
    found = doctor("--cache", tmp_path, code=exits.FAILED)
    assert "is of format 99" in found["directory"].says


def test_a_store_is_asked_as_a_job_asks_it(s3: Bucket, tmp_path: Path) -> None:
    url = s3.put("a/b.tar", bytes(100_000))
    for named in (url, url.removesuffix("b.tar"), url.replace("b.tar", "{b,c}.tar")):
        found = doctor(named, "--cache", tmp_path / "none")
        assert found["credentials"].says.endswith("from AWS_ACCESS_KEY_ID")
        assert found["endpoint"].state == found["clock"].state == found["read"].state == "ok"
        assert url in found["object"].says
        assert "97.7 KiB in" in found["read"].says
        assert found["read"].url == named


def test_of_a_prefix_a_shard_is_read_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"{}")
    (tmp_path / "shard.00000.mds").write_bytes(bytes(100_000))
    found = {each.name: each for each in checks.of_store(f"{tmp_path}/")}
    assert "shard.00000.mds, 97.7 KiB" in found["object"].says
    assert "97.7 KiB in" in found["read"].says


def test_no_secret_is_shown(s3: Bucket, tmp_path: Path) -> None:
    url = s3.put("a.tar", b"x")
    environ = {**os.environ, "AWS_SECRET_ACCESS_KEY": "GEHEIM/geheim", "AWS_SESSION_TOKEN": "GEHEIM-token"}
    done = run_cli("doctor", url, "https://me:GEHEIM@127.0.0.1:1/x", "--cache", tmp_path, check=False, env=environ)
    assert done.returncode == exits.FAILED
    assert "the keys and the session token from AWS_ACCESS_KEY_ID" in done.stdout
    assert "GEHEIM" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://bucket", "is a bucket, not an object"),
        ("/no/such/{a,b", "its braces do not match"),
        ("/no/such/file.tar", "/no/such/file.tar"),
        ("gopher://host/x", "gopher"),
    ],
)
def test_urls_that_cannot_be_read_fail(url: str, says: str, tmp_path: Path) -> None:
    found = doctor(url, "--cache", tmp_path / "none", code=exits.FAILED)
    assert says in found["store"].says


@pytest.fixture
def skewed() -> Iterator[tuple[str, list[float]]]:
    """A web server with a clock that is so many seconds off."""
    offset = [0.0]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def do_GET(self) -> None:
            self.send_error(404)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + offset[0])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", offset
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("off", "state", "says"),
    [
        (0.0, "ok", "0 s"),
        (100.0, "warn", "behind"),
        (-100.0, "warn", "ahead of"),
        (1000.0, "fail", "1000 s behind"),
    ],
)
def test_a_clock_that_is_off(skewed: tuple[str, list[float]], off: float, state: str, says: str) -> None:
    address, offset = skewed
    offset[0] = off
    found = {each.name: each for each in checks.of_store(f"{address}/a.tar")}
    assert found["endpoint"].state == "ok"  # it answers, if only with 403
    assert (found["clock"].state, bool(found["clock"].cure)) == (state, state != "ok")
    assert says in found["clock"].says
    assert found["store"].state == "fail"


def test_an_endpoint_that_is_no_web_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n")
            listening.close()

        thread = Thread(target=talk)
        thread.start()
        found = {each.name: each for each in checks.of_store(f"http://127.0.0.1:{listening.getsockname()[1]}/a.tar")}
        thread.join()
    assert found["endpoint"].state == "fail"
    assert "does not answer as a web server does: BadStatusLine" in found["endpoint"].says
    assert found["store"].state == "fail"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates_and_proxies_are_those_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, authority = certify(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with server(answer(404, b""), certificate=both) as options:
        url = f"{options.endpoint_url}/a.tar"
        assert "CERTIFICATE_VERIFY_FAILED" in {each.name: each for each in checks.of_store(url)}["endpoint"].says
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        assert {each.name: each.state for each in checks.of_store(url)}["endpoint"] == "ok"
    with server(answer(404, b"")) as proxy:
        monkeypatch.setenv("http_proxy", str(proxy.endpoint_url).replace("//", "//me:GEHEIM@"))
        found = list(checks.of_store("http://web.invalid/a.tar"))
        assert (found[0].name, found[0].state) == ("endpoint", "ok")
        assert "GEHEIM" not in str(found)


@pytest.mark.parametrize(("share", "state"), [(0.25, "ok"), (0.75, "warn"), (1.5, "fail")])
def test_memory_of_the_arena_against_what_a_process_may_use(share: float, state: str) -> None:
    found = checks.memory(CacheLimits(int(memory_limit_bytes() * share), 0))
    assert (found.state, bool(found.cure)) == (state, state != "ok")


def test_few_descriptors_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = checks.descriptors()
        assert (found.state, found.cure[:10]) == ("warn", "run `ulimi")
        assert "up to 256 requests" in found.says
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_package_that_is_missing_or_old_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["numpy>=999.1", "no-such-package", "rich>=1", 'x>=1; extra == "y"']
    )
    found = list(checks.versions())[-1]
    assert found.state == "fail"
    assert found.cure == "pip install 'numpy>=999.1' 'no-such-package'"
