"""Whether a store keeps to the conditions of writes.

Some accept `If-None-Match` and `If-Match` and ignore them, or one of them, or only where no object is. Two writers
would then both believe to have won, which no single one of them can notice. So it is tried out, with a few small
objects, before anything depends on it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

from fastload.errors import ConfigError, WriteConflictError
from fastload.store.types import Store


def check_conditions(store: Store, folder_url: str) -> None:
    """Raises `ConfigError`, which says what is ignored, where conditional writes under `folder_url` cannot be trusted.
    Writes there, and deletes what it has written.
    """
    url = f"{folder_url.rstrip('/')}/.fastload-probe-{secrets.token_hex(8)}"
    try:
        store.put_if_absent(url, b"created")
        with _refused(url, "If-None-Match: *, so that two writers can create the same object"):
            store.put_if_absent(url, b"created again")
        first = store.head(url).etag
        if first is None:
            raise ConfigError(f"{url}: this store gives no ETags, so that nothing can be replaced on a condition")
        try:
            second = store.put_if_match(url, b"replaced", first)
        except WriteConflictError as error:
            raise ConfigError(f"{url}: this store refuses If-Match with the ETag that it gave itself") from error
        with _refused(url, "If-Match, so that two writers can replace the same version"):
            store.put_if_match(url, b"replaced again", first)
        store.delete(url)
        with _refused(url, "If-Match where no object is, so that one that was deleted can be replaced"):
            store.put_if_match(url, b"replaced once more", second or first)
    finally:
        store.delete(url)


@contextlib.contextmanager
def _refused(url: str, ignored: str) -> Iterator[None]:
    try:
        yield
    except WriteConflictError:
        return
    raise ConfigError(
        f"{url}: this store ignores {ignored}; use a version of it that keeps to conditional writes, or another store"
    )
