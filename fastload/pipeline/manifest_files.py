"""Manifests in files: one that unconnected ranks share, and the versions that a state may name.

A manifest file is JSON, written to a temporary file and linked into place, so that it is never seen half written and
the first writer wins, also on a network file system:

    {"fastload_manifest": 1, "fingerprint": "...", "urls": ["s3://bucket/train/"], "manifest": {...}}

`urls` are what the user asked for, and have to be the same wherever the file is used; `manifest` is what
`Manifest.to_json` gives. Where the data is listed again for each epoch, epoch 3 of `train.json` is in
`train.epoch-3.json`: a file that exists is taken as it is, so a run that is repeated or resumed reads what the first
one read.

Without a file of the user's, versions are kept in the cache directory, the last few of each data set, as
`manifests/<hash of the URLs>-<fingerprint>.json`. docs/format.md describes both.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fastload import callers
from fastload.cache import syscalls, url_without_credentials
from fastload.cache.tempfiles import is_stale, temp_names
from fastload.errors import ConfigError, StateError
from fastload.plan import Manifest
from fastload.store import normalise
from fastload.waiting import DEADLINE_S, Waits, wait

FILE_VERSION = 1
_KEPT_MAX = 8
_HEAD_BYTES = 4096
_FINGERPRINT = re.compile(rb'"fingerprint":"([0-9a-f]{32})"')

# File systems without hard links: a rename puts the file there as well, and where two do it at once the last one wins.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    fastload_manifest: int
    fingerprint: str
    urls: list[str]
    manifest: msgspec.Raw


def shared_manifest(
    path: str | os.PathLike[str],
    urls: Sequence[str],
    *,
    is_first: bool,
    list_shards: Callable[[], Manifest],
    epoch: int | None = None,
    waits: Waits | None = None,
    deadline_s: float = DEADLINE_S,
) -> Manifest:
    """The manifest in the file at `path`, of one epoch where `epoch` is given.

    Where the file is not there yet, the rank that `is_first` makes it of what `list_shards` returns, and the others
    wait for it. Raises `ConfigError` where the file is of other URLs, damaged, or cannot be written, and
    `WaitTimeoutError`.
    """
    place = path_of(path, epoch)
    found = _read(place, urls)
    if found is None and is_first:
        _write(place, urls, list_shards())
        found = _read(place, urls)  # which may be that of another rank 0, who was quicker
    elif found is None:
        _wait_for(place, waits, deadline_s)
        found = _read(place, urls)
    if found is None:
        raise ConfigError(f"manifest={str(place)!r} was there and has gone; leave it where it is while a job runs")
    return found


def frozen(path: str | os.PathLike[str], urls: Sequence[str]) -> Manifest | None:
    """The manifest in the file at `path`; None where it is not there yet. Raises `ConfigError` as above."""
    return _read(path_of(path), urls)


def path_of(path: str | os.PathLike[str], epoch: int | None = None) -> Path:
    """Where the manifest of an epoch is, or the one of all epochs."""
    place = Path(path).expanduser().absolute()
    return place if epoch is None else place.with_name(f"{place.stem}.epoch-{epoch}{place.suffix}")


def keep(directory: Path, urls: Sequence[str], manifest: Manifest) -> None:
    """Keep a version in the cache directory, so that a state which names it can be resumed; old ones are removed.

    A directory that cannot be written to causes a warning.
    """
    folder = directory / "manifests"
    mine = _urls_id(urls)
    place = folder / f"{mine}-{manifest.fingerprint}.json"
    try:
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir(folder)
        if place.exists():
            os.utime(place)
        else:
            _publish(place, _encode(urls, manifest))
        _drop_old(folder, mine)
    except OSError as error:
        callers.warn(
            f"the list of shards cannot be kept in {folder} ({error.strerror or error}): a job that is to go on in the "
            "middle of this epoch after the data has changed will not find it. Mend the directory, or name a file with "
            "manifest=...",
            RuntimeWarning,
        )


def find(fingerprint: str, directory: Path, urls: Sequence[str], path: str | os.PathLike[str] | None) -> Manifest:
    """The version that a state names: from the user's files at `path`, or from the cache directory.

    Raises `StateError` where it is in neither.
    """
    for place in _files_of(fingerprint, path):
        found = _read(place, urls)
        if found is not None and found.fingerprint == fingerprint:
            return found
    kept = directory / "manifests" / f"{_urls_id(urls)}-{fingerprint}.json"
    with contextlib.suppress(ConfigError):  # damaged: as good as none
        found = _read(kept, urls)
        if found is not None and found.fingerprint == fingerprint:
            return found
    beside = "" if path is None else f" nor beside {path_of(path)}"
    raise StateError(
        f"the state was saved in the middle of an epoch with the list of shards {fingerprint}, which is not among the "
        f"last {_KEPT_MAX} that are kept in {kept.parent}{beside}; resume where that run kept its lists (its cache "
        "directory, or the file that it was given as manifest=...), or begin the epoch anew"
    )


def _files_of(fingerprint: str, path: str | os.PathLike[str] | None) -> list[Path]:
    """Those of the user's files that say that they hold this version."""
    if path is None:
        return []
    place = path_of(path)
    pattern = re.compile(re.escape(place.stem) + r"(\.epoch-\d+)?" + re.escape(place.suffix))
    places = [place.parent / name for name in _names(place.parent) if pattern.fullmatch(name)]
    return [each for each in places if _fingerprint_of(each) == fingerprint]


def _fingerprint_of(place: Path) -> str | None:
    """What the beginning of a file says, so that not all have to be read."""
    with contextlib.suppress(FileNotFoundError), place.open("rb") as file:
        match = _FINGERPRINT.search(file.read(_HEAD_BYTES))
        return match[1].decode() if match else None
    return None


def _wait_for(place: Path, waits: Waits | None, deadline_s: float) -> None:
    def is_there() -> bool:
        # Opening the directory has a network file system look whether it has changed.
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        return place.exists()

    what = (
        f"rank 0 to write manifest={str(place)!r}; see whether rank 0 runs, and whether it writes to the same file "
        "system (all ranks need one that they share), or call torch.distributed.init_process_group before iterating"
    )
    looking = threading.Condition()  # never notified: `wait` looks every second
    with looking:
        wait(looking, is_there, "listing", what=what, waits=waits, deadline_s=deadline_s)


def _read(place: Path, urls: Sequence[str]) -> Manifest | None:
    """The manifest in a file, None where there is no file."""
    source = f"manifest={str(place)!r}"
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror or error}; name another file") from error
    try:
        read = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source} is not a manifest file: {error}; remove it to have it made anew") from error
    if read.fastload_manifest != FILE_VERSION:
        raise ConfigError(
            f"{source} has version {read.fastload_manifest}; this fastload reads version {FILE_VERSION}: remove it to "
            "have it made anew"
        )
    if read.urls != _named(urls):
        raise ConfigError(
            f"{source} was made of {_shown(read.urls)}, and this data set is {_shown(_named(urls))}; name another "
            "file, or remove it to have it made anew"
        )
    return Manifest.from_json(read.manifest, source)


def _write(place: Path, urls: Sequence[str], manifest: Manifest) -> None:
    try:
        _publish(place, _encode(urls, manifest))
    except OSError as error:
        raise ConfigError(
            f"manifest={str(place)!r} cannot be written: {error.strerror or error}; name a file in a directory that is "
            "there and that you may write to"
        ) from error


def _encode(urls: Sequence[str], manifest: Manifest) -> bytes:
    file = _File(FILE_VERSION, manifest.fingerprint, _named(urls), msgspec.Raw(manifest.to_json()))
    return msgspec.json.encode(file)


def _publish(place: Path, data: bytes) -> None:
    """Put a file in its place, whole, unless there is one already. A state depends on it: it outlives a crash."""
    temp = place.with_name(next(temp_names()))
    fd = syscalls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(temp, place)
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed
            syscalls.unlink(temp)


def _link(temp: Path, place: Path) -> None:
    try:
        syscalls.link(temp, place)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        syscalls.rename(temp, place)


def _drop_old(folder: Path, mine: str) -> None:
    entries = syscalls.scandir(folder)
    kept = [(syscalls.entry_stat(entry).st_mtime_ns, entry.path) for entry in entries if entry.name.startswith(mine)]
    stale = [entry.path for entry in entries if is_stale(entry.name)]
    for path in [*stale, *(path for _, path in sorted(kept)[:-_KEPT_MAX])]:
        with contextlib.suppress(FileNotFoundError):  # another rank was quicker
            syscalls.unlink(path)


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def _named(urls: Sequence[str]) -> list[str]:
    return [url_without_credentials(normalise(url)) for url in urls]


def _urls_id(urls: Sequence[str]) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(_named(urls)), digest_size=8).hexdigest()


def _shown(urls: Sequence[str]) -> str:
    return f"{urls[0]} and {len(urls) - 1} more" if len(urls) > 1 else urls[0]
