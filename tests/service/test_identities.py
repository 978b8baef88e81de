"""Which store is asked, and as whom, is what each job's own settings say, whoever started the service.

A service is started by a job in a poisoned environment: every variable and file that leads to a store, to somebody's
credentials or through a proxy leads to a trap. Another job asks through the same service; and the other way round.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastload
from bench.chaos.store import certify
from fastload.client import Handle as Cache
from fastload.errors import AccessDeniedError, ConfigError, StoreUnavailableError
from tests.conftest import Bucket
from tests.service.helpers import service_pid
from tests.store.servers import Handler, answer, server

pytestmark = pytest.mark.usefixtures("real_start")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "PLANTED"  # in every poisoned value that is a secret

# Of a job, in a process of its own: it starts the service and stays until its input ends.
STARTER = """
import sys, fastload.client
consumer = fastload.client.Handle(sys.argv[1]).consumer()
print("ready", flush=True)
sys.stdin.read()
"""


class Trap:
    """Whoever comes here was led by somebody else's settings."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, handler: Handler) -> None:
        self.seen.append(f"{handler.command} {handler.path} {handler.headers.get('Authorization')}")
        handler.send_error(403)


class Objects:
    """A store at another endpoint that has something else under each key; who asked, by access key."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked_as = data, set[str]()

    def __call__(self, handler: Handler) -> None:
        key = re.search(r"Credential=([^/]+)", handler.headers.get("Authorization") or "")
        self.asked_as.add(key[1] if key else "")
        start, end = map(int, re.findall(r"\d+", handler.headers["Range"] or f"0-{len(self.data) - 1}"))
        body = self.data[start : end + 1]
        about = f"bytes {start}-{start + len(body) - 1}/{len(self.data)}"
        answer(206 if handler.headers["Range"] else 200, body, Content_Range=about, ETag='"1"')(handler)


def poison(trap: str, home: Path) -> dict[str, str]:
    """Variables of every kind, and the files of tools in a home directory."""
    key = f"{SECRET}KEY"
    (home / ".aws").mkdir(parents=True)
    (home / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id={key}\naws_secret_access_key={SECRET}\nendpoint_url={trap}\n"
    )
    gcloud = home / ".config" / "gcloud" / "application_default_credentials.json"
    gcloud.parent.mkdir(parents=True)
    gcloud.write_text(json.dumps(dict.fromkeys(("client_id", "client_secret", "refresh_token"), SECRET)))
    (home / "token").write_text(SECRET)
    (home / "ca.pem").write_text("")
    return {
        "HOME": str(home),
        "AWS_ENDPOINT_URL": trap,
        "AWS_ENDPOINT_URL_S3": trap,
        "AWS_ENDPOINT_URL_STS": trap,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SECRET,
        "AWS_REGION": "poisoned-1",
        "AWS_PROFILE": "default",
        "AWS_SHARED_CREDENTIALS_FILE": str(home / ".aws" / "credentials"),
        "AWS_ROLE_ARN": f"arn:{SECRET}",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(home / "token"),
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": trap,
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(home / "token"),
        "AWS_METADATA_ENDPOINT": trap,
        "AWS_REQUEST_PAYER": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_SSE_CUSTOMER_KEY_BASE64": SECRET,
        "AWS_PROXY_URL": trap,
        "AWS_SKIP_SIGNATURE": "true",
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), trap.replace("//", f"//user:{SECRET}@")),
        "HTTPS_PROXY": trap,
        **dict.fromkeys(("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"), str(home / "ca.pem")),
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({"private_key": SECRET}),
        "GOOGLE_APPLICATION_CREDENTIALS": str(gcloud),
        "AZURE_STORAGE_ACCOUNT_NAME": "poisoned",
        "AZURE_STORAGE_ACCOUNT_KEY": SECRET,
        "AZURE_STORAGE_SAS_KEY": f"sig={SECRET}",
        "AZURE_CLIENT_SECRET": SECRET,
        "FSSPEC_FTP_PASSWORD": SECRET,
        "HF_TOKEN": SECRET,
    }


def clean() -> dict[str, str]:
    """This process's environment, less all that says anything of stores."""
    begin = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "HF_", "SSL_CERT", "REQUESTS_", "CURL_")
    return {n: v for n, v in os.environ.items() if not n.startswith(begin) and not n.lower().endswith("_proxy")}


@pytest.fixture(autouse=True)
def clean_here(s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = clean()
    for name in set(os.environ) - set(kept):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@contextmanager
def job(directory: Path, environ: dict[str, str]) -> Iterator[None]:
    """One that starts the directory's service and keeps it."""
    command = [sys.executable, "-c", STARTER, str(directory)]
    process = subprocess.Popen(command, env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def by_hand(directory: Path, environ: dict[str, str]) -> Iterator[None]:
    """A service that a user has started, who ends it, too."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "fastload.service", f"--directory={directory}", f"--ready-fd={writing}"]
    process = subprocess.Popen(command, env=environ, cwd=ROOT, pass_fds=[writing])
    os.close(writing)
    try:
        with open(reading) as said:
            assert json.loads(said.readline()) == {"status": "ready"}
        yield
    finally:
        process.terminate()
        process.wait()


def keys(bucket: Bucket, which: str = "") -> dict[str, Any]:
    """Storage options as the owner, or as the one who may do nothing."""
    options = bucket.denied_options if which == "denied" else bucket.options
    return {"endpoint_url": options.endpoint_url, "key": options.access_key_id, "secret": options.secret_access_key}


def read(url: str, cache: Cache, options: dict[str, Any] | None = None) -> bytes:
    with fastload.open(url, cache, storage_options=options) as file:
        return file.read()


@pytest.mark.parametrize("start", [job, by_hand])
def test_a_service_that_was_started_in_a_poisoned_environment_asks_as_each_job_says(
    s3: Bucket, tmp_path: Path, start: Callable[[Path, dict[str, str]], AbstractContextManager[None]]
) -> None:
    url = s3.put("a.bin", b"mine")
    trap = Trap()
    nobody = {"metadata_endpoint": "http://127.0.0.1:1", "deadline_s": 0}
    with ExitStack() as stack:
        at = stack.enter_context(server(trap)).endpoint
        stack.enter_context(start(tmp_path / "cache", {**clean(), **poison(at, tmp_path / "poisoned")}))
        cache = stack.enter_context(Cache(tmp_path / "cache"))
        assert read(url, cache, keys(s3)) == b"mine"
        # Not with the keys of whoever started it, nor from what the owner has just had fetched.
        with pytest.raises((AccessDeniedError, StoreUnavailableError)):
            read(url, cache, {"endpoint_url": s3.options.endpoint_url, **nobody})
        # Nor at the endpoint of either: the provider's own.
        with pytest.raises(StoreUnavailableError, match=r"https://s3\.eu-west-1\.amazonaws\.com"):
            read(url, cache, {"key": "K", "secret": "S", "region": "eu-west-1", "deadline_s": 0})
        for other in ("gs://bucket/a.bin", "az://container/a.bin"):
            with pytest.raises((StoreUnavailableError, AccessDeniedError, ConfigError)) as error:
                read(other, cache, {"account_name": "mine", "deadline_s": 0})
            assert "poisoned" not in str(error.value)
        with cache.consumer(keys(s3)) as consumer:
            pid = service_pid(consumer)
        begun_with = Path(f"/proc/{pid}/environ").read_bytes().decode()
    assert trap.seen == []
    if start is job:
        assert SECRET not in begun_with
        assert at not in begun_with
        assert str(tmp_path / "poisoned") not in begun_with


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_whom_a_job_trusts_others_do_not(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, authority = certify(tmp_path)
    with ExitStack() as stack:
        at = stack.enter_context(server(Objects(b"theirs"), certificate=both)).endpoint
        trusting = {"SSL_CERT_FILE": str(authority), "AWS_CA_BUNDLE": str(authority)}
        stack.enter_context(job(tmp_path / "cache", {**clean(), **trusting}))
        cache = stack.enter_context(Cache(tmp_path / "cache"))
        options = {"endpoint_url": at, "key": "K", "secret": "S", "deadline_s": 0}
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="TLS certificate is not accepted"):
                read(f"{s3.url}/a.bin", cache, options)
            with monkeypatch.context() as patch:
                patch.setenv("SSL_CERT_FILE", str(authority))
                assert read(f"{s3.url}/a.bin", cache, options) == b"theirs"


def test_the_proxy_of_a_job_is_not_that_of_others(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, proxied = s3.put("a.bin", b"mine"), Objects(b"by proxy")
    with server(proxied) as at, Cache(tmp_path / "cache") as cache:
        monkeypatch.setenv("http_proxy", at.endpoint)
        assert read(url, cache, keys(s3)) == b"by proxy"
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        assert read(url, cache, keys(s3)) == b"mine"
        monkeypatch.delenv("no_proxy")
        monkeypatch.delenv("http_proxy")
        assert read(url, cache, keys(s3)) == b"mine"
        assert read(url, cache, {**keys(s3), "proxy_url": at.endpoint}) == b"by proxy"
    assert proxied.asked_as == {s3.options.access_key_id}


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_jobs_of_one_service_are_led_by_their_own_settings(s3: Bucket, tmp_path: Path, mode: Any) -> None:
    """Two endpoints and two identities, by one URL."""
    url = s3.put("a.bin", b"mine")
    other = Objects(b"theirs")
    with server(other) as at, Cache(tmp_path / "cache", service=mode) as cache:
        there = {"endpoint_url": at.endpoint, "key": "OTHER", "secret": "S"}
        for _ in range(2):
            assert read(url, cache, keys(s3)) == b"mine"
            with pytest.raises(AccessDeniedError):  # who asked just now may, and the bytes are here
                read(url, cache, keys(s3, "denied"))
            assert read(url, cache, there) == b"theirs"
    assert other.asked_as == {"OTHER"}


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_an_environment_that_changes_leads_elsewhere(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    url = s3.put("a.bin", b"mine")
    other, trap = Objects(b"theirs"), Trap()
    with server(other) as at, server(trap) as trapped, Cache(tmp_path / "cache", service=mode) as cache:
        for name, value in s3.server.environment().items():
            monkeypatch.setenv(name, value)
        assert read(url, cache) == b"mine"
        monkeypatch.setenv("AWS_ENDPOINT_URL", at.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
        assert read(url, cache) == b"theirs"
        # The process's own environment counts for nothing that the options settle.
        for name, value in poison(trapped.endpoint, tmp_path / "poisoned").items():
            if name.startswith("AWS_") and name not in ("AWS_CA_BUNDLE", "AWS_SSE_CUSTOMER_KEY_BASE64"):
                monkeypatch.setenv(name, value)
        settled = {"virtual_hosted_style_request": "false", "request_payer": "false", "anonymous": False, "region": "r"}
        there = {"endpoint_url": at.endpoint, "key": "OTHER", "secret": "S", **settled}
        assert read(f"{s3.url}/b.bin", cache, there) == b"theirs"
    assert other.asked_as == {"OTHER"}
    assert trap.seen == []


def test_in_a_users_process_a_variable_that_would_be_used_in_place_of_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore reads these by itself, and cannot be told not to."""
    with Cache(tmp_path / "cache", service="inprocess") as cache:
        monkeypatch.setenv("AZURE_STORAGE_TOKEN", SECRET)
        with pytest.raises(ConfigError, match=r"AZURE_STORAGE_TOKEN in the environment of this process") as error:
            read("az://container/a.bin", cache, {"account_name": "mine", "account_key": "AAAA"})
        assert SECRET not in str(error.value)
