"""webdataset over fastload: `import fastload.adapters.webdataset as wds`.

Every name of webdataset is here, and all that works on samples is webdataset's own: `decode`, `to_tuple`, `rename`,
`map`, `select`, `batched`, `with_epoch`, … What reads shards is fastload: the first stages of a pipeline, from the list
of shards to the dicts of bytes, become one stage that reads a `fastload.StreamingDataset`. So shards are cached on the
node and fetched ahead, and each sample comes exactly once an epoch, whatever the numbers of ranks, workers and shards.

What differs, and why:

- A shuffle that follows the shards directly is fastload's (see docs/shuffling.md) and not a buffer's, whatever its
  size; later ones are webdataset's. The seed is 0 unless one is given, so that ranks agree.
- Samples are dealt to ranks and workers one by one, not by shard: `split_by_node` and `split_by_worker` are there, and
  are not needed; no shard is read by one rank only, and no rank ends early.
- `resampled=True` reads epochs without end, each in another order: a sample does not come again before all have come.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.utils.data
import webdataset
from webdataset.shardlists import expand_urls

from fastload import callers
from fastload.client.cache import AnyCache
from fastload.dataset import StreamingDataset
from fastload.errors import ConfigError
from fastload.loader import DataLoader
from fastload.pipeline.columns import ANY

__all__ = ["DataPipeline", "WebDataset", "WebLoader"]

_SPLITTERS = (webdataset.split_by_node, webdataset.split_by_worker, webdataset.single_node_only)
_URL_IN_A_COMMAND = re.compile(r"""\b(?:s3|gs|az|https?)://[^\s'"|;<>]+""")


def __getattr__(name: str) -> Any:
    """What is not of this module is webdataset's."""
    try:
        return getattr(webdataset, name)
    except AttributeError:
        raise AttributeError(f"neither {__name__} nor webdataset {webdataset.__version__} has {name!r}") from None


class _Samples(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The first stage: this rank's (in a worker of torch's: that worker's) samples, as dicts of bytes."""

    def __init__(
        self, urls: Sequence[str], is_endless: bool, keeps: Callable[[str], bool] | None, **options: Any
    ) -> None:
        super().__init__()
        self._urls, self._options = urls, options
        self._is_endless, self._keeps = is_endless, keeps
        self._data = StreamingDataset(urls, columns=[ANY], **options)

    def shuffled(self) -> _Samples:
        """In windows of shards."""
        return _Samples(self._urls, self._is_endless, self._keeps, **{**self._options, "shuffle": "window"})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            count = 0
            for sample in self._data:
                found = {
                    name: value for name, value in sample.items() if value is not None and self._is_kept(sample, name)
                }
                if len(found) > 2:  # more than its key and URL
                    count += 1
                    yield found
            if not self._is_endless or not count:
                return

    def _is_kept(self, sample: dict[str, Any], name: str) -> bool:
        return self._keeps is None or name.startswith("__") or bool(self._keeps(f"{sample['__key__']}.{name}"))

    def close(self) -> None:
        self._data.close()


class DataPipeline(webdataset.DataPipeline):  # type: ignore[misc]
    """webdataset's `DataPipeline`. Where its stages begin with a list of shards and go on to `tarfile_to_samples`,
    fastload reads these, with its `cache` and `storage_options`.

    ConfigError where another stage than a shuffle or a split comes between them.
    """

    pipeline: list[Any]

    def __init__(
        self, *stages: Any, cache: AnyCache = None, storage_options: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        super().__init__(*stages, **others)
        if self.pipeline and isinstance(self.pipeline[0], webdataset.SimpleShardList | webdataset.ResampledShards):
            self.pipeline = _with_reader(self.pipeline, {"cache": cache, "storage_options": storage_options})


class WebDataset(DataPipeline, webdataset.FluidInterface):  # type: ignore[misc]
    """webdataset's `WebDataset`, read by fastload.

    Beside webdataset's arguments, `cache` and `storage_options` are those of `fastload.StreamingDataset`. ConfigError
    for what fastload cannot read: `pipe:` commands, specifications of several data sets, `rename_files`.
    """

    def __init__(
        self,
        urls: Any,
        handler: Callable[[Exception], bool] = webdataset.reraise_exception,
        mode: str | None = None,
        resampled: bool = False,
        repeat: bool = False,
        shardshuffle: int | bool | None = None,
        cache_size: int = -1,
        cache_dir: str | None = None,
        url_to_name: Any = None,
        detshuffle: bool = False,
        nodesplitter: Any = webdataset.split_by_node,
        workersplitter: Any = webdataset.split_by_worker,
        select_files: Callable[[str], bool] | None = None,
        rename_files: Callable[[str], str] | None = None,
        empty_check: bool = True,
        verbose: bool = False,
        seed: int | None = None,
        *,
        cache: AnyCache = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if cache_dir is not None:
            callers.warn(
                f"cache_dir={cache_dir!r} is not used: fastload keeps what it fetches in its own cache; cache="
            )
        _check_reading(handler, rename_files)
        is_endless = resampled or mode == "resampled"
        options: dict[str, Any] = {
            "cache": cache,
            "storage_options": storage_options,
            "shuffle": _how(shardshuffle or is_endless),
            "seed": _checked_seed(seed),
            **_ranks_of(nodesplitter, workersplitter),
        }
        super().__init__(_Samples(_checked_urls(urls), is_endless, select_files, **options))

    def shuffle(self, size: int, **options: Any) -> WebDataset:
        """fastload's where it follows the shards, webdataset's where it follows another stage."""
        if size < 1 or len(self.pipeline) > 1:
            return super().shuffle(size, **options)  # type: ignore[no-any-return]
        shuffled = copy.copy(self)
        shuffled.pipeline = [self.pipeline[0].shuffled()]
        return shuffled

    def __enter__(self) -> WebDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class WebLoader(webdataset.DataPipeline, webdataset.FluidInterface):  # type: ignore[misc]
    """webdataset's `WebLoader`, around a `fastload.DataLoader`, which takes torch's arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(DataLoader(*args, **options))


def _with_reader(stages: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """The stages, with those that read shards replaced by one."""
    ends = [number for number, stage in enumerate(stages) if _function_of(stage) is webdataset.tarfile_to_samples.f]
    if not ends:
        return list(stages)
    end = ends[0]
    is_endless = isinstance(stages[0], webdataset.ResampledShards)
    shuffles = is_endless or getattr(stages[0], "seed", None) is not None
    for stage in stages[1:end]:
        if _is_shuffle(stage):
            shuffles = True
        elif stage not in _SPLITTERS:
            raise ConfigError(
                f"{_name(stage)} stands before tarfile_to_samples(), where fastload reads the shards itself; only "
                "shuffle, detshuffle, split_by_node and split_by_worker can stand there"
            )
    reads = stages[end].kw
    _check_reading(reads.get("handler", webdataset.reraise_exception), reads.get("rename_files"))
    following = list(stages[end + 1 :])
    how = _how(shuffles)
    if following and _is_shuffle(following[0]):
        following, how = following[1:], "window"
    urls = list(stages[0].urls)
    options = {**options, "shuffle": how, "seed": 0}
    return [_Samples(_checked_urls(urls), is_endless, reads.get("select_files"), **options), *following]


def _is_shuffle(stage: Any) -> bool:
    return _function_of(stage) is webdataset.shuffle.f or isinstance(stage, webdataset.detshuffle)


def _function_of(stage: Any) -> Any:
    return getattr(stage, "f", None)


def _name(stage: Any) -> str:
    function = _function_of(stage) or stage
    return getattr(function, "__name__", type(function).__name__)


def _how(shuffles_shards: object) -> str | bool:
    return "shards" if shuffles_shards else False


def _checked_seed(seed: int | None) -> int:
    return 0 if seed is None else int(seed)


def _check_reading(handler: Any, rename_files: Any) -> None:
    if rename_files is not None:
        raise ConfigError("rename_files= changes names within shards; rename columns with .rename(new='old') instead")
    if handler is not webdataset.reraise_exception:
        callers.warn(
            f"handler={_name(handler)} is not used where shards are read: fastload tries again by itself, and raises "
            "what stays wrong, so that no sample is lost unseen; handlers of decode() and map() are used"
        )


def _ranks_of(nodesplitter: Any, workersplitter: Any) -> dict[str, int]:
    """What the splitters mean for fastload, which deals samples to ranks and workers itself."""
    if workersplitter not in _SPLITTERS:
        raise ConfigError(
            f"workersplitter={workersplitter!r}: fastload deals samples to workers itself; leave it out, since "
            "without it each worker would give all samples"
        )
    if nodesplitter is None:
        return {"rank": 0, "world_size": 1}
    if nodesplitter not in _SPLITTERS:
        raise ConfigError(
            f"nodesplitter={_name(nodesplitter)}: fastload deals samples to ranks itself; leave it out, or give None "
            "where each rank is to read all of them"
        )
    return {}


def _checked_urls(urls: Any) -> list[str]:
    """As fastload takes them; `::` separates several, and braces are expanded."""
    if isinstance(urls, Mapping) or (isinstance(urls, str) and urls.endswith((".yaml", ".yml", ".json"))):
        raise ConfigError(
            f"{urls!r} names several data sets with shares; mix them with fastload.Mixture([(dataset, share)])"
        )
    found: Iterable[Any] = expand_urls(urls) if isinstance(urls, str) else urls
    return [_plain(str(url)) for url in found]


def _plain(url: str) -> str:
    if url.startswith("pipe:"):
        named = _URL_IN_A_COMMAND.findall(url)
        cure = f"write {named[0]!r}" if named else "give the URL of the shard"
        raise ConfigError(f"{url!r}: fastload runs no commands, and reads from stores itself; {cure}")
    return url.removeprefix("file:") if url.startswith("file:") and not url.startswith("file://") else url
