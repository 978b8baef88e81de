"""From a state, which nests dicts and lists, to named leaves, and back.

A leaf is called by its path with dots between, as torch's own checkpoints call it (`model.layers.0.weight`). Paths are
kept as well, since the dots do not say where a key ends: a string or integer for a key, `[n]` for a place in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastload.errors import CheckpointDamagedError, ConfigError

Path = tuple[Any, ...]
# How far a state nests: what is deeper nests in itself, as a rule, and what reads it would run out of stack.
DEPTH_MAX = 200


def flatten(state: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Path and leaf by name. What is no dict with keys of strings or integers and no list is a leaf, and so is an empty
    one. Raises `ConfigError` where the state has no names that can be written down.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"state: a {type(state).__name__} has no names; put it into a dict")
    root = dict(state)
    if not _has_names(root):
        key = next(key for key in root if not _is_name(key))
        raise ConfigError(f"state: the key {key!r} is a {type(key).__name__}; name it by a string or an integer")
    found: dict[str, tuple[Path, Any]] = {}
    for path, leaf in _leaves(root, ()):
        name = ".".join(str(each[0] if isinstance(each, list) else each) for each in path)
        if name in found or not name:
            other = found[name][0] if name else "nothing"
            raise ConfigError(f"state: {list(path)} would be called {name!r} as {other} is; rename one of them")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"state: the name {name!r} is no Unicode ({error.reason}); rename it") from error
        found[name] = path, leaf
    return found


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if len(path) > DEPTH_MAX:
        raise ConfigError(
            f"state: {'.'.join(map(str, path[:3]))} and so on nests more than {DEPTH_MAX} levels deep, or in itself; "
            "make it flatter"
        )
    if type(value) is list and value:
        for number, each in enumerate(value):
            yield from _leaves(each, (*path, [number]))
    elif isinstance(value, dict) and value and _has_names(value):
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif path:
        yield path, value


def _has_names(value: Mapping[Any, Any]) -> bool:
    return all(map(_is_name, value))


def _is_name(key: Any) -> bool:
    return type(key) is str or (type(key) is int and -(1 << 63) <= key < 1 << 64)


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
