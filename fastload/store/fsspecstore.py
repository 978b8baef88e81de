"""Every other scheme, through fsspec: hdfs, sftp, memory, and all else that has a file system there.

For reach, not for speed: fsspec hands out fresh bytes, which are copied, and has no conditional read, so that each read
asks for the object's size, ETag and time, before and after: it says nothing of the reply that the bytes came with.
Writes are as whole and as durable as the file system makes them, and there are none on a condition: what fsspec calls
"create" looks first and writes then.
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from typing_extensions import Buffer

from fastload.errors import AccessDeniedError, ConfigError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.redaction import showable
from fastload.store.answers import changed, truncated
from fastload.store.logins import login_of
from fastload.store.options import StoreOptions
from fastload.store.replies import other_version
from fastload.store.settings import FSSPEC, LOGINS
from fastload.store.types import ObjectInfo
from fastload.store.urls import folder_without_slash, how_to_name, scheme

# Other names of schemes that we read ourselves.
_OURS = {"gcs": "gs", "s3n": "s3"}


class FsspecStore:
    """One file system of fsspec; `root` is `scheme://authority`. See `Store` for the contract."""

    def __init__(self, root: str, options: StoreOptions) -> None:
        self._scheme = scheme(root)
        try:
            fsspec = importlib.import_module("fsspec")
        except ImportError as error:
            raise ConfigError(
                f"{root}: the scheme {self._scheme!r} needs fsspec; pip install 'fastload[fsspec]'"
            ) from error
        try:
            # Listings are not cached: a listing is asked for to learn what is there now.
            settings = {"use_listings_cache": False, "skip_instance_cache": True, **_arguments(self._scheme, options)}
            login = login_of(root, dict(options.extra))
            full = root if login is None else root.replace("://", f"://{login}@")
            self._system, path = fsspec.core.url_to_fs(full + "/", **settings)
            self._root, self._root_path = root, path.rstrip("/")
        except (ConnectionError, TimeoutError) as error:  # some connect at once
            raise _explain(error, root) from showable(error)
        except (ImportError, ValueError, TypeError, OSError) as error:
            ours = f"; or write {_OURS[self._scheme]}://, which needs no fsspec" if self._scheme in _OURS else ""
            raise ConfigError(f"{root}: fsspec cannot open it: {error}{ours}") from showable(error)

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """All objects whose URL starts with `prefix_url`, in the order of their URLs."""
        folder = prefix_url.rpartition("/")[0]
        try:
            details = self._system.find(folder + "/", detail=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _explain(error, prefix_url) from showable(error)
        found = [
            self._info(self._root + name.removeprefix(self._root_path), detail) for name, detail in details.items()
        ]
        yield from sorted((info for info in found if info.url.startswith(prefix_url)), key=lambda info: info.url)

    def head(self, url: str) -> ObjectInfo:
        """The object at `url`."""
        try:
            detail = self._system.info(url)
        except OSError as error:
            raise _explain(error, url) from showable(error)
        if detail.get("type") == "directory":
            raise ObjectMissingError(folder_without_slash(url))
        return self._info(url, detail)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `start`."""
        self._check_version(info)
        try:
            data = self._system.cat_file(info.url, start=start, end=start + len(out))
        except OSError as error:
            raise _explain(error, info.url) from showable(error)
        if len(data) != len(out):
            raise truncated(info.url, len(data), len(out), start)
        self._check_version(info)
        out[:] = data

    def put(self, url: str, data: Buffer) -> str | None:
        """Store `data` as the object at `url`."""
        try:
            self._system.makedirs(url.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(url, bytes(data))
        except OSError as error:
            raise _explain(error, url) from showable(error)
        return self.head(url).etag

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        """Always a `ConfigError`, as `put_if_match` is."""
        self._refuse_condition(url)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        self._refuse_condition(url)

    def delete(self, url: str) -> None:
        """Delete the object at `url`."""
        try:
            self._system.rm_file(url)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _explain(error, url) from showable(error)

    def _refuse_condition(self, url: str) -> NoReturn:
        raise ConfigError(
            f"{url}: {self._scheme}:// is reached through fsspec, which has no conditional writes, so that of two "
            "writers neither would notice the other; write to s3://, gs://, az:// or a path"
        )

    def close(self) -> None:
        """Nothing: fsspec closes what it opened when the file system is collected."""

    def _check_version(self, info: ObjectInfo) -> None:
        now = self.head(info.url)
        if other := other_version(info, now.size, now.etag, now.mtime_ns):
            raise changed(info.url, other)

    def _info(self, url: str, detail: Mapping[str, Any]) -> ObjectInfo:
        etag = detail.get("ETag") or detail.get("etag")
        times = (detail.get(name) for name in ("mtime", "LastModified", "last_modified", "created"))
        size = detail.get("size")
        if not isinstance(size, int) or size < 0:
            raise StoreError(f"{url}: its file system does not say how large it is; copy it to one that does")
        return ObjectInfo(url, size, etag, next((_nanoseconds(time) for time in times if time), 0))


def _arguments(protocol: str, options: StoreOptions) -> dict[str, Any]:
    """What the consumer found for this file system, and what was given without a protocol's name."""
    extra, sources = dict(options.extra), dict(options.sources)
    given = {name: value for name, value in extra.items() if sources.get(name) == "storage_options" and name != LOGINS}
    for_fsspec = json.loads(given.pop(FSSPEC, extra.get(FSSPEC, "{}")))
    return {**for_fsspec.get(protocol, {}), **given, **for_fsspec.get("*", {})}


def _nanoseconds(time: object) -> int:
    """File systems give seconds, a datetime, or text that is no use here."""
    if isinstance(time, datetime.datetime):
        time = time.timestamp()
    return int(time * 1e9) if isinstance(time, int | float) else 0


def _explain(error: OSError, url: str) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"{url}: there is no such object; {how_to_name(url)}")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"{url}: access denied; check the credentials")
    return StoreUnavailableError(f"{url}: {error}; it is retried until the deadline")
