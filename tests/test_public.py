"""The public names are a promise, and so are the tables in docs/."""

import re
import subprocess
import sys
from pathlib import Path

import fastload
from fastload import errors, metrics

DOCS = Path(__file__).parent.parent / "docs"


def test_public_names() -> None:
    names = ["Cache", "DataLoader", "Mixture", "Ragged", "StreamingDataset", "decode", "install", "open", "uninstall"]
    assert sorted(fastload.__all__) == sorted([*names, *fastload._ERRORS])
    assert set(fastload.__all__) <= set(dir(fastload))
    for name in fastload.__all__:
        assert getattr(fastload, name).__doc__, name
    decoders = ["array", "image", "integer", "json", "number", "raw", "text"]
    assert sorted(fastload.decode.__all__) == ["Decoder", *decoders]


def test_every_exception_is_public_and_documented() -> None:
    kinds = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FastloadError)
    }
    assert {kind.__name__ for kind in kinds} == set(fastload._ERRORS)
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert {name for name, _ in table} == set(fastload._ERRORS)
    for name, builtin in table:
        assert issubclass(getattr(fastload, name), getattr(__builtins__, builtin, None) or eval(builtin)), name


def test_errors_cross_the_socket() -> None:
    for name in fastload._ERRORS:
        error = errors.from_wire(*errors.to_wire(getattr(fastload, name)("what is wrong")))
        assert type(error).__name__ == name
        assert str(error) == "what is wrong"
    assert errors.to_wire(OSError("no room"))[0] == "ServiceError"


def test_every_statistic_is_documented() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (DOCS / "stats.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(metrics.STATS_KEYS)


def test_the_service_and_the_command_line_do_without_torch() -> None:
    code = (
        "import sys, fastload.service.server, fastload.cli, fastload.warm; assert 'torch' not in sys.modules, 'torch'; "
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, fastload.service.server; "
        "assert not {'torch', 'numba'} & set(sys.modules), {'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
