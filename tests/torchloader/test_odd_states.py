"""Data sets whose `state_dict` is something else: read as torch reads them; one warning when a state is asked for."""

from __future__ import annotations

import threading
import warnings
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch.utils.data

import fastload


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> int:
        return 10 * number


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        return iter(range(0, 240, 10) if info is None else range(info.id * 1000, info.id * 1000 + 120, 10))


class Raises:
    def state_dict(self) -> Any:
        raise ValueError("not mine")

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("there is none to be loaded")


class Wants(Raises):
    def state_dict(self, prefix: str) -> Any:  # type: ignore[override]
        return {}


class Attribute(Raises):
    state_dict = {"a": 1}  # type: ignore[assignment]  # noqa: RUF012  # as a user may write it


class Property(Raises):
    @property
    def state_dict(self) -> Any:  # type: ignore[override]
        raise RuntimeError("do not look")


class NotPickled(Raises):
    def state_dict(self) -> Any:
        return {"lock": threading.Lock(), "function": lambda: None}


class Mocked(Raises):
    def state_dict(self) -> Any:
        return MagicMock()


class Answers:
    """Whatever it is asked for, it has it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Mock(name=name)


KINDS = [Raises, Wants, Attribute, Property, NotPickled, Mocked, Answers]
MODES = [(kind, workers) for kind in KINDS for workers in ("none", "thread")]
# The others make no difference there.
MODES += [(kind, "process") for kind in (Raises, NotPickled, Mocked, Answers)]


def made(kind: type, base: type) -> Any:
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})()


def loader_of(kind: type, base: type, workers: str) -> Any:
    options: dict[str, Any] = {} if workers == "none" else {"num_workers": 2, "workers": workers}
    return fastload.DataLoader(made(kind, base), batch_size=3, **options)


@pytest.mark.parametrize("base", [Numbers, Stream])
@pytest.mark.parametrize(("kind", "workers"), MODES)
def test_read_as_torch_reads_it_and_gone_on_with(kind: type, base: type, workers: str) -> None:
    loader = loader_of(kind, base, workers)
    plain = fastload.DataLoader(base(), batch_size=3, num_workers=loader.num_workers, workers="thread")
    expected = [batch.tolist() for batch in plain]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind is Answers and workers == "thread":
            warnings.simplefilter("ignore")  # what cannot be copied for each thread
        assert [batch.tolist() for batch in loader] == expected
        batches = iter(loader)
        assert [next(batches).tolist() for _ in range(3)] == expected[:3]
    with pytest.warns(UserWarning, match=f"over {kind.__name__}{base.__name__} leaves out") as warned:
        state = loader.state_dict()
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.state_dict() == state
    assert "because" not in str(state)
    assert [batch.tolist() for batch in batches] == expected[3:]
    again = loader_of(kind, base, workers)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [batch.tolist() for batch in again] == expected[3:]
