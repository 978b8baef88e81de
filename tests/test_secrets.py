"""Secrets of every kind are planted, and nothing that anybody can read has one: errors with all that caused them, logs,
warnings, names of threads, figures, states, files, command lines, and the service's environment.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import FastloadError
from fastload.prepare import index
from tests.conftest import Bucket
from tests.shards import tar_of
from tests.store.servers import Handler, answer, server

pytestmark = pytest.mark.usefixtures("real_start")

SECRET = "PLANTED"  # in every secret, but for those of the real store
LOGIN = f"user:{SECRET}"
SHARD = tar_of({f"{number}": {"txt": b"text"} for number in range(8)})


class Web:
    """A web server that wants a login."""

    def __call__(self, handler: Handler) -> None:
        if handler.headers.get("Authorization") != f"Basic {base64.b64encode(LOGIN.encode()).decode()}":
            handler.send_error(401)
            return
        start, end = map(int, re.findall(r"\d+", handler.headers["Range"]))
        body = SHARD[start : end + 1]
        about = f"bytes {start}-{start + len(body) - 1}/{len(SHARD)}"
        answer(206, body, Content_Range=about, ETag='"1"')(handler)


def same(sample: dict[str, Any]) -> dict[str, Any]:
    """For worker processes to do."""
    return sample


class Seen:
    """All that was to be seen."""

    def __init__(self, *secrets: str) -> None:
        encoded = base64.b64encode(LOGIN.encode()).decode()
        self._secrets = (SECRET, encoded, *secrets)

    def check(self, what: str, text: str | bytes) -> None:
        shown = text if isinstance(text, str) else text.decode("latin-1")
        for secret in self._secrets:
            at = shown.find(secret)
            assert at < 0, f"{what} shows a secret: ...{shown[max(0, at - 300) : at + 100]}"

    def fails(self, call: Callable[[], object], *words: str) -> None:
        """The call raises an error of ours, which is looked at with everything behind it."""
        with pytest.raises(FastloadError) as raised:
            call()
        for word in words:
            assert word in str(raised.value)
        link: BaseException | None = raised.value
        self.check("an error", "".join(traceback.format_exception(raised.value)))
        while link is not None:
            self.check("an error", f"{link} {link!r} {link.args}")
            link = link.__cause__


@pytest.fixture
def seen(s3: Bucket) -> Seen:
    return Seen(s3.server.secret_access_key, s3.server.denied_secret_access_key)


def test_a_job_shows_none(
    s3: Bucket, seen: Seen, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AZURE_STORAGE_SAS_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN", "FSSPEC_FTP_PASSWORD"):
        monkeypatch.setenv(name, f"sig={SECRET}")
    monkeypatch.setenv("https_proxy", f"http://{LOGIN}@127.0.0.1:1")
    with server(Web()) as web, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        urls = [s3.put("a.tar", SHARD), f"{web.endpoint}/b.tar".replace("//", f"//{LOGIN}@")]
        cache = fastload.Cache(tmp_path / "cache", ram_bytes="32MiB", disk_bytes="32MiB", chunk_bytes="64KiB")
        index(urls, cache, output=tmp_path / "index.parquet")
        dataset = fastload.StreamingDataset(urls, cache=cache, manifest=tmp_path / "manifest.json", refresh="epoch")
        loader = fastload.DataLoader(dataset.map(same), batch_size=2, num_workers=1)
        batches = iter(loader)
        samples = [next(batches)]
        stats = loader.stats()
        service = Path(f"/proc/{stats['node']['pid']}")
        seen.check("the service's environment", (service / "environ").read_bytes())
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                seen.check("a command line", (process / "cmdline").read_bytes())
        for thread in threading.enumerate():
            seen.check("a thread's name", thread.name)
        samples += batches
        assert sum(len(batch["txt"]) for batch in samples) == 16
        told = [stats, loader.stats(), cache.stats(), loader.state_dict(), dataset.urls, samples]
        seen.check("what is told", f"{told} {loader!r} {dataset!r} {dataset._data!r} {dataset.__dict__} {cache!r}")
        loader.close()
        cache.close()
    seen.check("a log", caplog.text)
    seen.check("a warning", "".join(str(each.message) for each in warned))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"manifest.epoch-0.json", "index.parquet", "service.log"} <= {path.name for path in files}
    for path in files:
        seen.check(path.name, path.read_bytes())
        seen.check("a file's name", str(path))


def test_what_fails_shows_none(
    s3: Bucket, seen: Seen, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    url = s3.put("a.tar", SHARD)
    at = {"endpoint_url": s3.options.endpoint_url, "deadline_s": 0}
    account = json.dumps(
        {"type": "service_account", "private_key": SECRET, "client_email": "x", "private_key_id": SECRET}
    )
    quoting = f"<Error><Code>X</Code><Message>https://h/?X-Amz-Signature={SECRET}</Message><AWSAccessKeyId>{SECRET}"
    with (
        server(answer(403, quoting.encode())) as quotes,
        fastload.Cache(tmp_path / "cache", ram_bytes="16MiB") as cache,
    ):

        def opening(name: str, options: dict[str, Any] | None = None) -> Callable[[], object]:
            return lambda: fastload.open(name, cache, storage_options=options).read()

        there = {**at, "endpoint_url": quotes.endpoint}
        seen.fails(
            opening(url, {**at, "key": f"{SECRET}KEY", "secret": SECRET}), "no such access key", "storage_options"
        )
        seen.fails(opening(url, {**at, "key": "FASTLOADOWNER", "secret": SECRET}), "the secret does not belong")
        seen.fails(opening(url, {**there, "key": SECRET, "secret": SECRET, "token": SECRET}), "session token from")
        seen.fails(opening(url, {**at, "key": SECRET}), "secret_access_key")
        seen.fails(opening(url, {"endpoint_url": f"http://{LOGIN}@127.0.0.1"}), "user name")
        seen.fails(opening(url, {"endpoint_url": f"{LOGIN}@127.0.0.1:9000"}), "is not a URL")
        seen.fails(opening(f"s3://key:{SECRET}@bucket/a.tar"), "s3://bucket/a.tar: its URL contained a login")
        seen.fails(opening(f"http://user:{SECRET}no@127.0.0.1:1/a.tar", {"deadline_s": 0}), "http://127.0.0.1:1")
        seen.fails(
            opening(f"{quotes.endpoint}/a.tar?token={SECRET}", {"deadline_s": 0}), "a.tar?token=***: access denied"
        )
        for name in ("X-Amz-Signature", "Signature", "sig"):
            seen.fails(opening(f"https://host.invalid/a.tar?{name}={SECRET}"), "signed URLs are not supported")
        seen.fails(opening(f"ftp://user:{SECRET}@127.0.0.1:1/a.tar", {"deadline_s": 0}), "ftp://127.0.0.1:1")
        seen.fails(opening("gs://b/a.tar", {"service_account_key": account}), "gs://b")
        seen.fails(opening("gs://b/a.tar", {"service_account_key": SECRET}), "gs://b")
        sas = f"sv=1&sig={SECRET}"
        named = {"endpoint_url": quotes.endpoint, "account_name": "me", "deadline_s": 0}
        seen.fails(opening("az://b/a.tar", {**named, "sas_key": sas}), "the shared access signature")
        seen.fails(opening("az://b/a.tar", {**named, "account_key": SECRET}), "az://b")
        seen.fails(opening(url, {**at, "acess_key": SECRET}), "unknown key")
        proxied = {"proxy_url": f"http://{LOGIN}@127.0.0.1:1", "deadline_s": 0}
        seen.fails(opening("http://host.invalid/a.tar", proxied), "host.invalid")
        seen.fails(opening(url, {**at, "key": "K", "secret": "S", **proxied}), "cannot reach the store")
        seen.fails(opening(url, {**at, "key": "K", "secret": "S", "proxy_url": f"socks9://{LOGIN}@h"}), "")
        (tmp_path / "token").write_text(SECRET)
        role = {"role_arn": f"arn:{SECRET}", "web_identity_token_file": str(tmp_path / "token")}
        seen.fails(opening(url, {**at, **role, "sts_endpoint": quotes.endpoint}), "the web identity of storage_options")
        relative = {"container_credentials_relative_uri": f"/{SECRET}", "metadata_endpoint": "http://127.0.0.1:1"}
        seen.fails(opening(url, {**at, **relative}), "the container's role")
        seen.check("what is told", str(cache.stats()))
        os.remove(tmp_path / "token")
    seen.check("a log", caplog.text)
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            seen.check(path.name, path.read_bytes())
