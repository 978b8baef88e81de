"""What the documents name is there: links, headings, files, modules, commands and their options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from fastload.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w./-])((?:bench|docs|examples|fastload|native|tests)/[\w./-]*\w)")
_MODULE = re.compile(r"python -m ((?:bench|fastload|tests)[\w.]*)")
_TARGET = re.compile(r"(?:^ {4}|`)make ([a-z]+)", re.MULTILINE)
_COMMAND = re.compile(r"(?:^ {4}|`)fastload ([a-z]+)((?:\\\n|[^\n`])*)", re.MULTILINE)
_OPTION = re.compile(r"(?<!\S)(--[a-z-]+)")


def anchors(document: Path) -> set[str]:
    """The names by which the headings of a document are linked to."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    for link in _LINK.findall(text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in _PATH.findall(text):
        assert (ROOT / path).exists() or path.startswith("bench/results/"), path
    for module in _MODULE.findall(text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for target in _TARGET.findall(text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def options(verb: str, rest: str) -> set[str]:
    """Those that a verb takes; of one with verbs of its own, that which `rest` names, or any."""
    verbs = typer.main.get_command(app)
    assert isinstance(verbs, TyperGroup)
    command = verbs.commands[verb]
    commands = [command]
    if isinstance(command, TyperGroup):
        named = [command.commands[word] for word in rest.split() if word in command.commands]
        commands = named or list(command.commands.values())
    parameters = [parameter for each in commands for parameter in each.params]
    return {"--help", *(name for each in parameters for name in (*each.opts, *each.secondary_opts))}


def test_commands_take_the_options_that_documents_give_them() -> None:
    seen = set()
    for document in DOCUMENTS:
        for verb, rest in _COMMAND.findall(document.read_text()):
            named = set(_OPTION.findall(rest.split("#")[0]))
            assert named <= options(verb, rest), f"{document.name}: fastload {verb} {named - options(verb, rest)}"
            seen |= named
    assert {"--cache", "--seed", "--from-history", "--cache-bytes"} <= seen
