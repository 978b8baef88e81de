"""The floors of the house: what may import what. A room is a folder or a module right under `fastload/`.

An import goes down: to a room on a lower floor, or to a module of the same room. Rooms on one floor do not know each
other. Imports inside functions and those for type checkers only count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fastload"

# What the service needs of checkpoints lies below it; what trainers need beside lies above the client.
BELOW = {f"fastload.checkpoint.{name}" for name in ["attempts", "boxes", "commit", "reading", "records", "segments"]}
# From the cellar to the roof.
FLOORS = [
    "cached_attribute cgroups lazy lifecycle redaction shares snapshot svgplot unpacker version",
    "errors",
    "callers config cpu_priority device kernels ragged strings",
    "timing",
    "waiting",
    "decode stats store transport",
    "arguments cache checkpoint(below) plan torchloader",
    "formats history protocol",
    "rendezvous",
    "service",
    "client",
    "checkpoint files metrics page pipeline reports",
    "dataset_base simulate",
    "dataset loader_stream prepare",
    "daemon data_schema loader mixture warmup",
    "compat",
    "__init__",
    "adapters bench demo",
    "cli",
    "__main__",
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    if module in BELOW:
        return "checkpoint(below)"
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each module of the package that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES:
                    yield node.lineno, name
                elif node.module in MODULES and node.module != module:
                    yield node.lineno, str(node.module)


ARROWS = {name: list(imports(name, ast.parse(path.read_text()))) for name, path in MODULES.items()}


def test_every_room_has_a_floor() -> None:
    assert set(map(room_of, MODULES)) == set(FLOOR_OF)


def test_imports_go_down() -> None:
    wrong = [
        f"{MODULES[module].relative_to(PACKAGE.parent)}:{line}: {room_of(module)} imports {name}, which is not below it"
        for module, arrows in ARROWS.items()
        for line, name in arrows
        if room_of(name) != room_of(module) and FLOOR_OF[room_of(name)] >= FLOOR_OF[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_a_circle() -> None:
    """Within a room as well. The fronts of packages are left out: they import lazily."""
    below = {
        name: {other for _, other in arrows} for name, arrows in ARROWS.items() if MODULES[name].name != "__init__.py"
    }
    while below:
        free = [name for name, others in below.items() if not others & below.keys()]
        assert free, "these import each other: " + ", ".join(_circle(below))
        for name in free:
            del below[name]


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules on one circle of a graph in which every node has an arrow to another."""
    path = [next(iter(graph))]
    while True:
        other = min(graph[path[-1]] & graph.keys())
        if other in path:
            return path[path.index(other) :]
        path.append(other)


def test_a_circle_is_seen() -> None:
    assert sorted(_circle({"a": {"b"}, "b": {"c"}, "c": {"b", "a"}})) in (["a", "b", "c"], ["b", "c"])
