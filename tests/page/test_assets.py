"""What the browser runs: our own files, and one of others as it was published."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastload.page

ASSETS = Path(fastload.page.__file__).parent / "assets"


def test_what_others_published_is_unchanged_and_has_its_licence() -> None:
    folder = ASSETS / "uplot"
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {path.name for path in folder.iterdir()} == {*sums, "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert (folder / "LICENSE").read_text().startswith("The MIT License")
    assert "uPlot (v1.6.32)" in (folder / "uPlot.iife.min.js").read_text()[:200]


class Tags(HTMLParser):
    """What a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text_in_scripts = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.text_in_scripts += data.strip()


def test_the_page_has_no_inline_script_or_style_and_names_own_files_only() -> None:
    tags = Tags()
    tags.feed((ASSETS / "page.html").read_text())
    assert not tags.text_in_scripts
    attributes = [(tag, name, value) for tag, each in tags.found for name, value in each.items()]
    assert not [each for each in attributes if each[1].startswith("on") or each[1] == "style"]
    named = {value for tag, name, value in attributes if name in ("src", "href") and not (value or "").startswith("#")}
    assert {str(path.relative_to(ASSETS)) for path in ASSETS.rglob("*.*") if path.name != "page.html"} == named


def test_every_label_and_element_that_is_named_is_there() -> None:
    tags = Tags()
    tags.feed((ASSETS / "page.html").read_text())
    ids = {each["id"] for _, each in tags.found if "id" in each}
    for _, each in tags.found:
        assert set((each.get("aria-labelledby") or "").split()) <= ids
        assert (
            each.get("href", "") in (None, "") or not str(each["href"]).startswith("#") or str(each["href"])[1:] in ids
        )
    assert set(re.findall(r'(?:byId|fill|plot)\("([a-z-]+)"', (ASSETS / "page.js").read_text())) <= ids


@pytest.mark.parametrize(
    "forbidden",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "http:", "https:"],
)
def test_names_can_become_nothing_but_text(forbidden: str) -> None:
    assert forbidden not in (ASSETS / "page.js").read_text()
