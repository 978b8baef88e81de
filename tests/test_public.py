"""The public names are a promise, and so are the tables in docs/."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastload
import fastload.client
import fastload.files
import fastload.store
from fastload import errors, stats

DOCS = Path(__file__).parent.parent / "docs"


def test_public_names() -> None:
    names = [
        "Cache",
        "DataLoader",
        "Mixture",
        "Ragged",
        "StreamingDataset",
        "install",
        "open",
        "schema",
        "uninstall",
        "warm",
    ]
    assert sorted(fastload.__all__) == sorted([*names, "decode", "formats", "metrics", *errors.__all__])
    assert set(fastload.__all__) <= set(dir(fastload))
    for name in fastload.__all__:
        assert getattr(fastload, name).__doc__, name
    decoders = ["array", "flat", "image", "integer", "json", "number", "raw", "text"]
    assert sorted(fastload.decode.__all__) == ["Decoder", *decoders]


@pytest.mark.parametrize("package", [fastload, fastload.files, fastload.client, fastload.store])
def test_type_checkers_see_the_names_that_are_imported_when_they_are_first_used(package: ModuleType) -> None:
    """Each where it is: the front of such a package lists them twice."""
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        module = importlib.import_module(str(line.module))
        names = [alias.name for alias in line.names]
        for name in errors.__all__ if names == ["*"] else names:
            seen[name] = getattr(module, name)
    assert seen == {name: getattr(package, name) for name in package.__all__}
    assert seen.keys() <= set(dir(package))
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'no_such'"):
        _ = package.no_such


def test_a_name_that_is_misspelt_is_suggested() -> None:
    code = "import fastload; fastload.Dataloader"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Did you mean: 'DataLoader'?" in ended.stderr


def test_every_exception_is_public_and_documented() -> None:
    kinds = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FastloadError)
    }
    assert {kind.__name__ for kind in kinds} == set(errors.__all__)
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert {name for name, _ in table} == set(errors.__all__)
    for name, builtin in table:
        assert issubclass(getattr(fastload, name), getattr(__builtins__, builtin, None) or eval(builtin)), name


def test_errors_cross_the_socket() -> None:
    for name in errors.__all__:
        error = errors.from_wire(*errors.to_wire(getattr(fastload, name)("what is wrong")))
        assert type(error).__name__ == name
        assert str(error) == "what is wrong"
    assert errors.to_wire(OSError("no room"))[0] == "ServiceError"


def test_every_statistic_is_documented() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (DOCS / "stats.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(stats.STATS_KEYS)


def test_the_service_and_the_command_line_do_without_torch() -> None:
    code = "import sys, fastload.service.host.server, fastload.cli, fastload.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, fastload.service.host.server; "
        "assert not {'torch', 'numba'} & set(sys.modules), {'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
