"""From a state, which nests dicts and lists, to named leaves, and back.

A leaf is called by its path with dots between, as torch's own checkpoints call it (`model.layers.0.weight`). Paths are
kept as well, since the dots do not say where a key ends: a string or integer for a key, `[n]` for a place in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastload.checkpoint.errors import CheckpointDamagedError
from fastload.errors import ConfigError

Path = tuple[Any, ...]
# How far a state nests: what is deeper nests in itself, as a rule, and what reads it would run out of stack.
DEPTH_MAX = 200


def flatten(state: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Path and leaf by name. What is no dict with keys of strings or integers and no list is a leaf, and so is an empty
    one.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for path, leaf in _leaves(state, ()):
        name = ".".join(str(each[0] if isinstance(each, list) else each) for each in path)
        if name in found or not name:
            other = found[name][0] if name else "nothing"
            raise ConfigError(f"state: {list(path)} would be called {name!r} as {other} is; rename one of them")
        found[name] = path, leaf
    return found


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if type(value) is list and value:
        for number, each in enumerate(value):
            yield from _leaves(each, (*path, [number]))
    elif isinstance(value, dict) and value and all(type(key) in (str, int) for key in value):
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif path:
        yield path, value


def unflatten(leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """The state of these leaves; a list has those that are there, in their order. Raises `CheckpointDamagedError` where
    one has the place of another, or is above it.
    """
    root = _Node()
    for path, leaf in leaves:
        at = root
        for step in path[:-1]:
            at = at.setdefault(_key(step), _Node())
            if type(at) is not _Node:
                raise CheckpointDamagedError(f"a checkpoint with a value at {list(path)} and one above it is damaged")
        key = _key(path[-1])
        if key in at:
            raise CheckpointDamagedError(f"a checkpoint with two values at {list(path)}, or one below, is damaged")
        at[key] = leaf
    return _finished(root)  # type: ignore[no-any-return]


def put(state: Any, path: Path, leaf: Any) -> None:
    """Replace the leaf at a path of a state that has one there."""
    for step in path[:-1]:
        state = state[_key(step)]
    state[_key(path[-1])] = leaf


class _Node(dict[Any, Any]):
    """A dict or list that is not a leaf."""


class _Index(int):
    """A place in a list."""


def _key(step: Any) -> Any:
    return _Index(step[0]) if isinstance(step, list) else step


def _finished(node: Any) -> Any:
    if type(node) is not _Node:
        return node
    if all(type(key) is _Index for key in node) and node:
        return [_finished(node[key]) for key in sorted(node)]
    return {key: _finished(each) for key, each in node.items()}
