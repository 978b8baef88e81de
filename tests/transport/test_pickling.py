"""Objects are pickled in the way that was registered last."""

from __future__ import annotations

import copyreg
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from fastload.transport.pickling import forking_dumps


class Odd:
    """A class whose pickles users decide about."""


def as_text(text: str) -> Any:
    return lambda value: (str, (text,))


def test_reducers_that_users_register_and_replace_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copyreg, "dispatch_table", dict(copyreg.dispatch_table))
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", dict(ForkingPickler._extra_reducers))
    assert isinstance(pickle.loads(forking_dumps(Odd())), Odd)
    for text in ("one", "two"):
        copyreg.pickle(Odd, as_text(text))
        assert pickle.loads(forking_dumps(Odd())) == text
    for text in ("three", "four"):
        ForkingPickler.register(Odd, as_text(text))
        assert pickle.loads(forking_dumps(Odd())) == text
