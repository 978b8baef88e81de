"""Frameworks train the same weights with our loader as with torch's: the examples, run with either.

Lightning, accelerate and transformers are not installed for the other tests; `make frameworks` does and runs these.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.utils.data
from torch import nn
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, SequentialSampler

import fastload
from examples import train_ddp
from fastload.loader import WorkersMode
from tests.jobs.pool import Failed, Rank, RankPool

TorchLoader = torch.utils.data.DataLoader

# Frameworks warn of much that is not ours.
FRAMEWORK = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks."""
    pool = RankPool(2)
    try:
        yield pool
    finally:
        pool.close()


def example(name: str, *packages: str) -> ModuleType:
    """An example that needs packages: the test is skipped where they are not installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed; `make frameworks` installs it")
    return __import__(f"examples.{name}", fromlist=[name])


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.parameters()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Bit for bit, and trained at all."""
    torch.manual_seed(0)
    assert not torch.equal(found[0], nn.Linear(8, 2).weight)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


class Counting:
    """Counts the iterations of our loader, so that a test does not compare torch's with itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        own = fastload.DataLoader.__iter__

        def iterate(loader: Any) -> Any:
            self.count += 1
            return own(loader)

        monkeypatch.setattr(fastload.DataLoader, "__iter__", iterate)


def ddp_rank(rank: Rank, workers: str | None, num_workers: int) -> list[list[float]]:
    def made(*args: Any, **options: Any) -> Any:
        options["num_workers"] = num_workers
        return (
            TorchLoader(*args, **options) if workers is None else fastload.DataLoader(*args, **options, workers=workers)
        )

    train_ddp.DataLoader = made  # type: ignore[assignment, misc]
    return [weight.flatten().tolist() for weight in weights(train_ddp.train())]


def test_distributed_data_parallel(pool: RankPool) -> None:
    """Few worker processes, since a rank of the pool takes a second to end one."""
    ranks = [Rank(rank, 2, 2, meets="ddp") for rank in range(2)]
    expected = pool.run("torch", ddp_rank, ranks, None, 0)
    assert not [answer for answer in expected if isinstance(answer, Failed)], expected
    assert expected[0] == expected[1]
    assert pool.run("processes", ddp_rank, ranks, "process", 1) == expected
    assert pool.run("threads", ddp_rank, ranks, "thread", 2) == expected


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@FRAMEWORK
@pytest.mark.parametrize("workers", ["process", "thread"])
def test_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: str) -> None:
    module = example("train_lightning", "lightning")
    settings = {**QUIET, "devices": 1, "default_root_dir": tmp_path}

    def ours(*args: Any, **options: Any) -> Any:
        return fastload.DataLoader(*args, **options, workers=workers)

    with monkeypatch.context() as patch:
        patch.setattr(module, "DataLoader", TorchLoader)
        expected = weights(module.train(**settings))
    iterations = Counting(monkeypatch)
    monkeypatch.setattr(module, "DataLoader", ours)
    assert same(weights(module.train(**settings)), expected)
    assert iterations.count == 2


@FRAMEWORK
def test_lightning_in_two_processes_with_its_sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("train_lightning", "lightning")
    settings = {**QUIET, "devices": 2, "strategy": "ddp_fork", "default_root_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(module, "DataLoader", TorchLoader)
        expected = weights(module.train(**settings))
    assert module.DataLoader is fastload.DataLoader
    assert same(weights(module.train(**settings)), expected)


@FRAMEWORK
@pytest.mark.parametrize("hook", [False, True])
def test_lightning_makes_a_loader_again_with_another_sampler(hook: bool) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed; `make frameworks` installs it")
    from lightning.fabric.utilities.data import _replace_dunder_methods
    from lightning.pytorch.utilities.data import _update_dataloader

    def made(cls: type, *args: Any, **options: Any) -> Any:
        if not hook:
            return cls(*args, **options)
        with _replace_dunder_methods(TorchLoader, "dataset"):
            return cls(*args, **options)

    options = {"num_workers": 1, "drop_last": True, "prefetch_factor": 3, "in_order": False, "workers": "thread"}
    dataset = list(range(10))
    loader = made(fastload.DataLoader, dataset, batch_size=2, shuffle=True, **options)
    sampler = DistributedSampler(dataset, 2, 1, shuffle=False)
    again = _update_dataloader(loader, sampler)
    assert type(again) is fastload.DataLoader
    assert again.sampler is sampler
    assert {name: getattr(again, name) for name in options} == options
    assert [batch.tolist() for batch in again] == [[1, 3], [5, 7]]


def trained_by_accelerate(module: ModuleType) -> list[torch.Tensor]:
    from accelerate.state import AcceleratorState

    try:
        return weights(module.train(module.Accelerator(cpu=True)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@FRAMEWORK
def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("train_accelerate", "accelerate")
    expected = trained_by_accelerate(module)
    iterations = Counting(monkeypatch)
    for workers in ("process", "thread"):
        fastload.install(workers)
        try:
            assert same(trained_by_accelerate(module), expected)
        finally:
            fastload.uninstall()
    assert iterations.count == 4


def accelerate_rank(rank: Rank, workers: WorkersMode | None) -> list[list[float]]:
    if workers is not None:
        fastload.install(workers)
    try:
        trained = trained_by_accelerate(example("train_accelerate"))
    finally:
        fastload.uninstall()
    return [weight.flatten().tolist() for weight in trained]


@FRAMEWORK
def test_accelerate_in_two_processes(pool: RankPool) -> None:
    example("train_accelerate", "accelerate")
    ranks = [Rank(rank, 2, 2, meets="accelerate") for rank in range(2)]
    expected = pool.run("torch", accelerate_rank, ranks, None)
    assert not [answer for answer in expected if isinstance(answer, Failed)], expected
    assert expected[0] == expected[1]
    assert pool.run("threads", accelerate_rank, ranks, "thread") == expected


@FRAMEWORK
def test_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("train_transformers", "transformers", "accelerate")
    settings = {"save_strategy": "no", "disable_tqdm": True, "report_to": []}
    expected = weights(module.train(str(tmp_path), **settings))
    iterations = Counting(monkeypatch)
    for workers in ("process", "thread"):
        fastload.install(workers)
        try:
            assert same(weights(module.train(str(tmp_path), **settings)), expected)
        finally:
            fastload.uninstall()
    assert iterations.count == 4


def test_torchs_name_makes_ours_once_installed_and_no_more_after() -> None:
    class Theirs(TorchLoader):
        pass

    before, constructor = TorchLoader([1, 2]), TorchLoader.__init__
    signature = inspect.signature(TorchLoader)
    fastload.install()
    fastload.install()
    try:
        loader = TorchLoader([1, 2, 3], batch_size=2)
        assert type(loader) is fastload.DataLoader
        assert isinstance(loader, TorchLoader)
        assert isinstance(before, TorchLoader)
        assert not isinstance(before, fastload.DataLoader)
        assert type(Theirs([1])) is Theirs
        assert type(pickle.loads(pickle.dumps(before))) is type(copy.copy(before)) is TorchLoader
        assert loader.workers == "auto"
        assert inspect.signature(TorchLoader) == signature
        with pytest.raises(ValueError, match="batch_size attribute should not be set"):
            loader.batch_size = 3
        fastload.install("thread")
        assert TorchLoader([1]).workers == "thread"
        assert TorchLoader([1], workers="process").workers == "process"
        assert TorchLoader([1], device="cpu").device == "cpu"
        with pytest.raises(fastload.ConfigError, match=r"install\(workers='side'\)"):
            fastload.install("side")
    finally:
        fastload.uninstall()
        fastload.uninstall()
    assert TorchLoader.__init__ is constructor
    assert type(TorchLoader([1])) is TorchLoader
    assert [batch.tolist() for batch in loader] == [[1, 2], [3]]


def test_a_constructor_that_was_wrapped_since_is_not_lost() -> None:
    fastload.install()
    ours = TorchLoader.__init__
    try:
        TorchLoader.__init__ = lambda self, *args, **options: ours(self, *args, **options)
        TorchLoader.__init__.__wrapped__ = ours
        fastload.install()  # it is there already
        with pytest.raises(RuntimeError, match="was wrapped after install"):
            fastload.uninstall()
        assert type(TorchLoader([1])) is fastload.DataLoader
    finally:
        TorchLoader.__init__ = ours
        fastload.uninstall()
    assert type(TorchLoader([1])) is TorchLoader


def test_the_signature_is_torchs() -> None:
    ours = dict(inspect.signature(fastload.DataLoader).parameters)
    assert ours.pop("workers").default == "auto"
    assert ours.pop("device").default is None
    assert ours.pop("snapshot_every_n_steps").default == 1  # as torchdata has it
    expected = dict(inspect.signature(TorchLoader).parameters)
    expected.setdefault("in_order", inspect.Parameter("in_order", inspect.Parameter.KEYWORD_ONLY, default=True))
    assert list(ours) == list(expected)
    for name, parameter in expected.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_a_loader_that_was_not_iterated_costs_nothing(num_workers: int) -> None:
    """accelerate asks for it of each loader that it is given."""

    def loader() -> fastload.DataLoader[Any]:
        return fastload.DataLoader(range(20), batch_size=3, shuffle=True, num_workers=num_workers, workers="thread")

    torch.manual_seed(6)
    before, threads = torch.get_rng_state(), threading.active_count()
    asked = loader()
    state = asked.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert threading.active_count() == threads
    expected = [batch.tolist() for batch in TorchLoader(range(20), batch_size=3, shuffle=True, num_workers=0)]
    torch.set_rng_state(before)
    assert [batch.tolist() for batch in asked] == expected
    other = loader()
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == expected


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


GIVEN: list[dict[str, Any]] = [
    {"dataset": [1, 2, 3]},
    {
        "dataset": [1, 2, 3, 4, 5],
        "batch_size": 2,
        "sampler": SequentialSampler(range(5)),
        "num_workers": 2,
        "collate_fn": sum,
        "drop_last": True,
        "timeout": 30,
        "worker_init_fn": print,
        "multiprocessing_context": torch.multiprocessing.get_context("fork"),
        "generator": torch.Generator(),
        "prefetch_factor": 4,
        "persistent_workers": True,
        "pin_memory_device": "cuda",
        "in_order": False,
    },
    {"dataset": [1, 2, 3], "batch_sampler": BatchSampler(SequentialSampler(range(3)), 2, False), "shuffle": False},
    {"dataset": Numbers(), "batch_size": None, "pin_memory": True},
]


@pytest.mark.parametrize("given", GIVEN)
def test_arguments_are_attributes_as_in_torch(given: dict[str, Any]) -> None:
    known = inspect.signature(TorchLoader).parameters  # older releases have no `in_order`
    torchs = TorchLoader(**{name: value for name, value in given.items() if name in known})
    ours = fastload.DataLoader(**given, workers="process")
    assert ours.workers == "process"
    names = [name for name in inspect.signature(TorchLoader).parameters if hasattr(torchs, name)]
    assert {"dataset", "batch_size", "sampler", "num_workers", "multiprocessing_context"} <= set(names)
    for name in names:
        found, expected = getattr(ours, name), getattr(torchs, name)
        assert found is given[name] if name in given else type(found) is type(expected), name
    for name in ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers"):
        with pytest.raises(ValueError, match=f"{name} attribute should not be set after DataLoader is initialized"):
            setattr(ours, name, getattr(ours, name))
    ours.num_workers = 0  # as frameworks do
    assert ours.num_workers == 0


@pytest.mark.parametrize(
    "given",
    [
        {"num_workers": -1},
        {"timeout": -1},
        {"prefetch_factor": 2},
        {"persistent_workers": True},
        {"shuffle": True, "sampler": [0]},
        {"batch_size": 2, "batch_sampler": [[0]]},
        {"batch_size": None, "drop_last": True},
        {"multiprocessing_context": "fork"},
        {"multiprocessing_context": "thread", "num_workers": 1},
    ],
)
def test_torchs_checks_and_messages(given: dict[str, Any]) -> None:
    def refusal(make: Callable[..., Any]) -> str:
        with pytest.raises((ValueError, TypeError)) as caught:
            make([1, 2], **given)
        return str(caught.value)

    assert refusal(fastload.DataLoader) == refusal(TorchLoader)
