"""A real page process that watches a real service."""

from __future__ import annotations

import http.client
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastload
from fastload.client.cache import Handle
from fastload.page import Running, running
from fastload.page.process import command
from tests.processes import until


@dataclass
class Page:
    """A page that runs, and a browser without a screen."""

    process: subprocess.Popen[str]
    at: Running
    path: str = ""
    cookie: str = ""

    def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, *, host: str | None = None
    ) -> http.client.HTTPResponse:
        """One request, with exactly these headers beside Host; `host=""` leaves that out."""
        connection = http.client.HTTPConnection(self.at.listen, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        host = self.at.host if host is None else host
        if host:
            connection.putheader("Host", host)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        if connection.sock is not None:
            connection.sock.close()  # the reply keeps it open until it is closed itself
        return response

    def sign_in(self) -> None:
        """As the address with the token does."""
        with self.request("GET", f"/?token={self.at.token}") as response:
            assert response.status == 303
            self.path = response.headers["Location"]
            self.cookie = response.headers["Set-Cookie"].split(";")[0]

    def get(self, name: str, method: str = "GET") -> http.client.HTTPResponse:
        """A file of the page, or its stream of events."""
        return self.request(method, self.path + name, {"Cookie": self.cookie, "Sec-Fetch-Site": "same-origin"})


StartPage = Callable[..., Page]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A cache directory without a service."""
    fastload.Cache(tmp_path / "cache", ram_bytes="32MiB", disk_bytes="64MiB", service="inprocess").close()
    return tmp_path / "cache"


@pytest.fixture
def start_page(directory: Path) -> Iterator[StartPage]:
    """Starts a page for the directory and signs in."""
    pytest.importorskip("starlette", reason="the extra `page` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `page` is not installed")
    with ExitStack() as stack:

        def start(**options: object) -> Page:
            process = stack.enter_context(
                subprocess.Popen(command(directory, **options), stdout=subprocess.PIPE, text=True)  # type: ignore[arg-type]
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            line = process.stdout.readline()
            at = running(directory)
            assert at is not None, line
            page = Page(process, at)
            assert line == f"the page is at {at.listen}\n"
            return page

        yield start


@pytest.fixture
def page(start_page: StartPage) -> Page:
    """A page to which one is signed in."""
    page = start_page()
    page.sign_in()
    return page


@pytest.fixture
def handle(directory: Path) -> Iterator[Handle]:
    """A way to the directory's service, which is a process of its own."""
    with Handle(directory) as handle:
        yield handle


def ended(page: Page) -> bool:
    """Whether the process has ended, and left no address behind."""
    until(lambda: page.process.poll() is not None)
    return page.process.returncode == 0
