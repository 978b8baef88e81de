"""The page in a real browser: what it shows, that it asks for nothing elsewhere, and that names stay text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fastload.client.cache import Handle
from tests.page.browser import CHROMIUM, Browser
from tests.page.conftest import Page, StartPage
from tests.processes import kill_service
from tests.store.servers import Handler, answer, server

HOSTILE = [
    "<img src=x onerror=\"document.title='broken'\">",
    "</td><script>document.title='broken'</script>",
    "\u202etxt.desrever\u2066",
    "x" * 10_000,
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with Browser(tmp_path / "browser") as browser:
        yield browser


@pytest.fixture
def page(start_page: StartPage) -> Page:
    """A page to which nobody is signed in."""
    return start_page()


def stays_here(browser: Browser, page: Page) -> bool:
    """Whether all that it asked for was the page's own."""
    asked = {urlsplit(url).netloc for url in browser.requests if not url.startswith(("about:", "data:"))}
    return asked == {page.at.host}


def test_ranks_in_a_browser(browser: Browser, page: Page, handle: Handle) -> None:
    with ExitStack() as stack:
        for rank in range(4):
            consumer = stack.enter_context(handle.consumer(name=f"loader {rank}"))
            waited = 6.0 if rank == 2 else 1.0
            consumer.report(
                rank=rank,
                epoch=0,
                samples=1000,
                elapsed_s=10.0,
                work_s=10.0 - waited,
                stalls={"fetch": waited, "decode": 0.0},
            )
        browser.open(page.at.url)
        browser.until("document.getElementById('state').textContent === 'live'")
        browser.until("document.querySelectorAll('#ranks .bar').length === 4")  # all have reported
        assert browser.run("document.querySelector('.slowest').closest('tr').innerText").startswith("rank 2")
        rows = browser.run("[...document.querySelectorAll('#ranks tr')].map((row) => row.innerText)")
        assert "work 40 %, fetch 60 %" in rows[2]
        assert "fetch-bound: " in rows[2]  # the service adds the verdict
        # The address has lost the token, and scripts cannot read the cookie.
        assert page.at.token not in browser.run("location.href + document.cookie + document.referrer")
        browser.until("document.getElementById('throughput-text').textContent.includes('RAM 0 B/s')")
        assert browser.errors == []
        assert stays_here(browser, page)


@pytest.mark.thorough
def test_a_service_that_is_replaced(browser: Browser, page: Page, handle: Handle, directory: Path) -> None:
    browser.open(page.at.url)
    browser.until("document.getElementById('state').textContent.includes('no cache service runs for')")
    with handle.consumer(name="first"):
        browser.until("document.getElementById('state').textContent === 'live'")
        before = browser.run("document.getElementById('node').textContent")
        kill_service(directory)
        browser.until(
            "document.getElementById('state').textContent === 'live'"
            f" && document.getElementById('node').textContent.split('·')[1] !== {json.dumps(before.split('·')[1])}"
        )
    browser.until("document.getElementById('state').className === 'bad'")
    assert browser.errors == []
    page.process.terminate()
    browser.until("document.getElementById('state').textContent.includes('does not answer')")


def test_hostile_names_stay_text(browser: Browser, page: Page, handle: Handle) -> None:
    with ExitStack() as stack:
        for name in HOSTILE:
            stack.enter_context(handle.consumer(name=name)).report(
                rank=7, elapsed_s=1.0, stalls={name: 0.5}, verdict=name
            )
        browser.open(page.at.url)
        browser.until(f"document.querySelectorAll('#ranks .bar').length === {len(HOSTILE)}")
        shown = browser.run("document.getElementById('ranks').textContent")
        for name in HOSTILE:
            assert name[:250] in shown
        assert browser.run("document.querySelectorAll('img, main script, main style, main a, iframe').length") == 0
        assert browser.run("document.title").startswith("fastload ")
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        # Each name's direction of writing ends with it.
        assert browser.run("[...document.querySelectorAll('#ranks .name')].every((each) => each.matches('bdi'))")
        assert browser.errors == []
        assert stays_here(browser, page)


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, page: Page, handle: Handle, scheme: str) -> None:
    browser.screen(360, 740, scheme)
    with handle.consumer(name="a-name-without-any-place-to-break-it-" * 5):
        browser.open(page.at.url)
        browser.until("document.querySelectorAll('#ranks tr').length === 1")
        browser.until("document.getElementById('throughput-text').textContent.startsWith('At')")
        assert browser.run("document.documentElement.scrollWidth") <= 360
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        if folder := os.environ.get("FASTLOAD_SCREENSHOTS"):
            browser.screenshot(Path(folder) / f"phone-{scheme}.png")
        assert browser.errors == []


@pytest.mark.thorough
def test_by_keyboard(browser: Browser, page: Page, handle: Handle) -> None:
    with handle.consumer(name="first"):
        browser.open(page.at.url)
        browser.until("document.getElementById('throughput-text').textContent.startsWith('At')")
        seen = []
        for _ in range(8):
            browser.press("Tab", 9)
            seen.append(browser.run("document.activeElement.id || document.activeElement.className"))
            if seen[-1] == "pause":
                browser.press("Enter", 13)
                assert browser.run("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
                browser.until("document.getElementById('state').textContent === 'paused'")
            if seen[-1] == "throughput":
                browser.press("ArrowLeft", 37)
                assert "RAM 0 B/s" in browser.run("document.getElementById('spoken').textContent")
        assert [each for each in seen if each] == ["skip", "pause", "throughput", "shares", *["scroll"] * 4]
        assert browser.run("document.querySelectorAll('main [tabindex=\"0\"]:not([aria-labelledby])').length") == 0
        assert browser.errors == []


@pytest.mark.thorough
def test_another_server_of_this_machine_gets_nothing(browser: Browser, page: Page) -> None:
    """What another user may serve on a port of the same host: it is sent no cookie of ours, and can read nothing."""
    browser.open(page.at.url)
    browser.until("document.getElementById('state').textContent !== 'connecting'")
    path = browser.run("location.pathname")
    seen: list[str] = []

    def lure(handler: Handler) -> None:
        seen.append(handler.headers.get("Cookie", ""))
        ours = f"http://{page.at.host}{path}"
        tries = (
            f"fetch({ours!r}, {{credentials: 'include'}}).then((reply) => reply.text()).then(() => 'read', () => 'no')"
        )
        body = f"<script>window.tried = {tries}</script><script src={ours}page.js></script>"
        answer(200, body.encode(), Content_Type="text/html", Content_Range="")(handler)

    with server(lure) as other:
        browser.open(f"{other.endpoint_url}/")
        assert browser.run("window.tried") == "no"
        assert browser.run("typeof SPAN_S") == "undefined"  # of our script
    assert seen[0] == ""


def test_a_name_that_was_rebound_to_this_machine_shows_nothing(browser: Browser, page: Page) -> None:
    browser.open(page.at.url)
    path = browser.run("location.pathname")
    port = page.at.host.rpartition(":")[2]
    for rest in (path, f"/?token={page.at.token}"):
        browser.open(f"http://rebound.example:{port}{rest}")
        assert browser.run("document.body.innerText").startswith("this page is not served under that name")
