"""Random crops and flips through whole loaders: what a sample looks like follows from seed, epoch and sample alone."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

import fastload
from fastload import decode
from tests.decode import pictures
from tests.patience import PATIENCE_S
from tests.shards import tar_of

RANDOM = decode.image(24, random_resized_crop=True, hflip=0.5)


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of ten pictures; one picture comes twice, and one is damaged."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    photo = pictures.photographs()[4]
    corners = rng.integers(0, 250, (29, 2))
    files = [pictures.jpeg(np.ascontiguousarray(photo[y : y + 90, x : x + 120]), "420") for y, x in corners]
    files.append(files[0])
    paths = []
    for number in range(3):
        samples = {f"{key:03d}": {"jpg": files[key]} for key in range(10 * number, 10 * number + 10)}
        paths.append(folder / f"{number}.tar")
        paths[-1].write_bytes(tar_of(samples))
    return [str(path) for path in paths]


def seen(loader: fastload.DataLoader) -> dict[str, bytes]:
    """What each sample looks like."""
    return {
        key: picture.numpy().tobytes()
        for batch in loader
        for key, picture in zip(batch["__key__"], batch["jpg"], strict=True)
    }


def loader_of(shards: list[str], cache: fastload.Cache, workers: int = 0, batch_size: int = 7, **options):
    dataset = fastload.StreamingDataset(shards, cache=cache, shuffle=True, decode={"jpg": RANDOM}, **options)
    return fastload.DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def test_the_same_for_any_number_of_threads_and_any_batch_size_and_new_in_each_epoch(shards, cache) -> None:
    with closing(loader_of(shards, cache)) as loader:
        first, second = seen(loader), seen(loader)
    assert len(first) == 30
    assert all(first[key] != second[key] for key in first)
    assert first["000"] != first["029"]  # the same file, another sample
    for workers, batch_size in ((2, 7), (1, 30), (0, 1)):
        with closing(loader_of(shards, cache, workers, batch_size)) as loader:
            assert seen(loader) == first
            assert seen(loader) == second
    with closing(loader_of(shards, cache, seed=1)) as loader:
        other = seen(loader)
    assert all(other[key] != first[key] for key in first)


def test_the_same_after_a_resume(shards, cache) -> None:
    with closing(loader_of(shards, cache)) as loader:
        seen(loader)
        whole = seen(loader)
    with closing(loader_of(shards, cache)) as loader:
        seen(loader)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
    with closing(loader_of(shards, cache)) as loader:
        loader.load_state_dict(state)
        rest = seen(loader)
    assert len(rest) == 23
    assert rest == {key: whole[key] for key in rest}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_same_sample_by_sample_and_in_torchs_own_loader(shards, cache) -> None:
    with closing(loader_of(shards, cache)) as loader:
        expected = seen(loader)
    options = {"cache": cache, "shuffle": True, "decode": {"jpg": RANDOM}}
    dataset = fastload.StreamingDataset(shards, **options)
    found = {sample["__key__"]: np.asarray(sample["jpg"]).tobytes() for sample in dataset}
    dataset.close()
    assert found == expected
    dataset = fastload.StreamingDataset(shards, batch_size=4, **options)
    workers = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context="fork", collate_fn=list, timeout=PATIENCE_S
    )
    found = {sample["__key__"]: np.asarray(sample["jpg"]).tobytes() for batch in workers for sample in batch}
    dataset.close()
    assert found == expected


def test_a_mixture_gives_each_source_its_own_seed_and_epochs(shards, cache) -> None:
    with closing(loader_of(shards, cache)) as loader:
        epochs = [seen(loader) for _ in range(3)]
    sources = [
        fastload.StreamingDataset(shards[:1], cache=cache, shuffle=True, decode={"jpg": RANDOM}),
        fastload.StreamingDataset(shards[1:], cache=cache, shuffle=True, decode={"jpg": RANDOM}, seed=9),
    ]
    with closing(loader_of(shards[:1], cache)) as loader:
        alone = [seen(loader) for _ in range(3)]
    assert [alone[0][key] == epochs[0][key] for key in alone[0]] == [True] * 10  # object numbers are those of the list
    mixture = fastload.Mixture([(sources[0], 1), (sources[1], 1)], stop="all")
    with closing(fastload.DataLoader(mixture, batch_size=6)) as loader:
        looks: dict[str, list[bytes]] = {}
        for batch in loader:
            for key, picture in zip(batch["__key__"], batch["jpg"], strict=True):
                looks.setdefault(key, []).append(picture.numpy().tobytes())
    assert any(len(each) > 1 for each in looks.values())
    for key, each in looks.items():
        assert len(set(each)) == len(each)
        if key < "010":
            assert each == [epoch[key] for epoch in alone[: len(each)]]
        else:
            assert each[0] != epochs[0][key]


def test_samples_beside_one_that_is_skipped_look_the_same(shards, cache, tmp_path: Path) -> None:
    with closing(loader_of(shards[:1], cache)) as loader:
        expected = seen(loader)
    good = Path(shards[0]).read_bytes()
    bad = bytearray(good)
    start = good.index(b"\xff\xda") + 20  # where the first picture's pixels begin
    bad[start : start + 40] = b"\xff\xd9" * 20
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(bad))
    with (
        closing(loader_of([str(path)], cache, on_error="skip")) as loader,
        pytest.warns(UserWarning, match="skipped a sample"),
    ):
        found = seen(loader)
    assert len(found) == 9
    assert found == {key: expected[key] for key in found}
