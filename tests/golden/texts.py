"""How golden values are written: one line for each entry, short digests, long texts by name."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_LONG = 200
# How deep entries have lines of their own.
_DEPTH = {"formats": 3, "figures": 1, "signatures": 3, "states": 5, "torchdata": 3}


def load(kind: str) -> Any:
    """What was recorded of a kind."""
    return json.loads((FOLDER / f"{kind}.json").read_text())


def save(kind: str, values: Any) -> None:
    """Record a kind."""
    (FOLDER / f"{kind}.json").write_text(_lines(values, _DEPTH.get(kind, 2)) + "\n")


def digest(value: Any) -> str:
    """Of a value of JSON's types."""
    return hashlib.blake2b(json.dumps(value, separators=(",", ":")).encode(), digest_size=8).hexdigest()


def with_texts_named(values: Any) -> dict[str, Any]:
    """`values` with long texts replaced by names, and these texts, packed: states repeat those of random numbers."""
    texts: dict[str, str] = {}

    def named(value: Any) -> Any:
        if isinstance(value, str) and len(value) > _LONG:
            name = f"text {digest(value)}"
            texts[name] = base64.b64encode(zlib.compress(value.encode(), 9)).decode()
            return name
        if isinstance(value, dict):
            return {key: named(each) for key, each in value.items()}
        return [named(each) for each in value] if isinstance(value, list | tuple) else value

    return {"values": named(values), "texts": texts}


def texts_put_back(recorded: dict[str, Any]) -> Any:
    """The values that `with_texts_named` was given."""
    texts = {name: zlib.decompress(base64.b64decode(text)).decode() for name, text in recorded["texts"].items()}

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return texts.get(value, value)
        if isinstance(value, dict):
            return {key: whole(each) for key, each in value.items()}
        return [whole(each) for each in value] if isinstance(value, list) else value

    return whole(recorded["values"])


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON whose entries have a line each down to `depth`, so that a change can be read as a difference of lines."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value)
    entries = (f"{indent} {json.dumps(key)}: {_lines(each, depth - 1, indent + ' ')}" for key, each in value.items())
    return "{\n" + ",\n".join(entries) + "\n" + indent + "}"
