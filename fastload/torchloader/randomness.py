"""The state of the random generators that the order of an epoch is drawn from.

Samplers draw from a generator of their own or from the global ones of torch, Python and numpy, some when their iterator
is made and some at the first index. A saved state with the generators of both moments can draw the same order again.
Afterwards generators that belong to the loader stay as they are, so that the next epoch's order follows; the global
ones, which belong to the user, are restored.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastload.errors import StateError

Generators = Mapping[str, torch.Generator]


@dataclass(frozen=True, slots=True)
class Randomness:
    """All generators that an order may be drawn from. `own`: those of loader and sampler, by name."""

    torch_state: torch.Tensor
    python_state: tuple[Any, ...]
    numpy_state: Mapping[str, Any]
    own: Mapping[str, torch.Tensor]

    @classmethod
    def now(cls, generators: Generators) -> Randomness:
        own = {name: generator.get_state() for name, generator in generators.items()}
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False), own)

    def restore(self, generators: Generators) -> None:
        self.restore_own(generators)
        self.restore_global()

    def restore_own(self, generators: Generators) -> None:
        """Set those of loader and sampler, by name; others are ignored."""
        for name, generator in generators.items():
            if name in self.own:
                generator.set_state(self.own[name])

    def restore_global(self) -> None:
        """Set the global generators."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        if self.numpy_state:
            np.random.set_state(dict(self.numpy_state))

    def restore_global_where_not(self, other: Randomness) -> None:
        """Like `restore_global`, except for generators that have the same state in `other`."""
        if not torch.equal(self.torch_state, other.torch_state):
            torch.set_rng_state(self.torch_state)
        if self.python_state != other.python_state:
            random.setstate(self.python_state)
        if self._global_json()["numpy"] != other._global_json()["numpy"]:
            np.random.set_state(dict(self.numpy_state))

    def to_json(self) -> dict[str, Any]:
        return {**self._global_json(), "own": {name: _text(state.numpy()) for name, state in self.own.items()}}

    @classmethod
    def from_json(cls, state: Any) -> Randomness:
        """Raises `StateError` for invalid input."""
        try:
            version, words, gauss = state["python"]
            python_state = (version, tuple(_array(words, np.uint32).tolist()), gauss)
            numpy_state = dict(state["numpy"])
            if numpy_state:
                numpy_state["state"] = {"key": _array(numpy_state["key"], np.uint32), "pos": numpy_state["pos"]}
            own = {name: torch.from_numpy(_array(text, np.uint8)) for name, text in state["own"].items()}
            return cls(torch.from_numpy(_array(state["torch"], np.uint8)), python_state, numpy_state, own)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state of the random numbers cannot be read ({error!r})") from error

    def _global_json(self) -> dict[str, Any]:
        version, words, gauss = self.python_state
        numpy_state: dict[str, Any] = {}
        if self.numpy_state.get("bit_generator") == "MT19937":  # the user may have replaced it by another
            inner = self.numpy_state["state"]
            numpy_state = {
                "bit_generator": "MT19937",
                "key": _text(inner["key"]),
                "pos": int(inner["pos"]),
                "has_gauss": int(self.numpy_state["has_gauss"]),
                "gauss": float(self.numpy_state["gauss"]),
            }
        return {
            "torch": _text(self.torch_state.numpy()),
            "python": [version, _text(np.array(words, np.uint32)), gauss],
            "numpy": numpy_state,
        }


@contextmanager
def preserve_global_generators() -> Iterator[None]:
    """Restore the global generators after the block."""
    before = Randomness.now({})
    try:
        yield
    finally:
        before.restore_global()


def generators_of(loader: Any) -> dict[str, torch.Generator]:
    """The generators that belong to a loader and its samplers."""
    batch_sampler = loader.batch_sampler
    owners = {
        "loader": loader,
        "sampler": loader.sampler,
        "batch_sampler": batch_sampler,
        "inner_sampler": getattr(batch_sampler, "sampler", None),
    }
    found: dict[str, torch.Generator] = {}
    for name, owner in owners.items():
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not each for each in found.values()):
            found[name] = generator
    return found


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _array(text: str, dtype: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
