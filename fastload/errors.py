"""Every exception that fastload raises on purpose.

The types are split by what the caller does next: mend the call (`ConfigError`), look at the bucket
(`ObjectMissingError`, `AccessDeniedError`), wait (`StoreUnavailableError`), list again (`ObjectChangedError`), look at
what another writer has put there (`WriteConflictError`), look at the data (`ShardError`, `DecodeError`,
`MissingColumnError`), look at the node (`CacheError`, `ServiceError`, `WorkerError`, `WaitTimeoutError`), or load
another state (`StateError`). Each is also the builtin that a caller would already catch.

An error crosses the socket between service and consumer as its type's name and its message, so every type is made from
one string. The message carries the value, the place and the cure.
"""

from __future__ import annotations

from typing import Any

from fastload.redaction import redact

__all__ = [
    "AccessDeniedError",
    "CacheError",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointExistsError",
    "ConfigError",
    "DecodeError",
    "FastloadError",
    "MissingColumnError",
    "ObjectChangedError",
    "ObjectMissingError",
    "ServiceError",
    "ShardError",
    "StateError",
    "StoreError",
    "StoreUnavailableError",
    "WaitTimeoutError",
    "WorkerError",
    "WriteConflictError",
]


class FastloadError(Exception):
    """The base of all of fastload's own exceptions. Its message shows no secret, also of those in URLs."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))

    def __str__(self) -> str:
        # KeyError would show the repr of the message.
        return str(self.args[0]) if self.args else ""


class ConfigError(FastloadError, ValueError):
    """An argument or setting that cannot be used; the message names it, its value and what would do."""


class StoreError(FastloadError, OSError):
    """An object store did not give what was asked for; the base of the five that follow."""


class ObjectMissingError(StoreError, FileNotFoundError):
    """No such bucket, object or file, or a pattern that matches nothing."""


class AccessDeniedError(StoreError, PermissionError):
    """The store refused: wrong credentials, or credentials without the right to read."""


class StoreUnavailableError(StoreError, ConnectionError):
    """The store could not be reached, or kept failing until the deadline."""


class ObjectChangedError(StoreError):
    """An object is no longer the one that was listed (its ETag, size or modification time differs)."""


class WriteConflictError(StoreError):
    """A conditional write lost: the object was there already, or is no longer the version that was to be replaced."""


class ShardError(FastloadError, ValueError):
    """The bytes of a shard are not what its format says; the message names URL and offset."""


class DecodeError(FastloadError, ValueError):
    """A sample's bytes could not be decoded; the message names URL, key and column."""


class MissingColumnError(FastloadError, KeyError):
    """A sample lacks a column that was asked for; the message names URL, key and column."""


class CacheError(FastloadError, OSError):
    """The cache directory cannot be used at all, or damaged bytes were found in it."""


class CheckpointError(FastloadError, ValueError):
    """A checkpoint lacks what was asked for, does not fit it, or is damaged; the message names object and place."""


class CheckpointDamagedError(CheckpointError):
    """What is stored is torn, was changed, or lacks a part: another step may be whole."""


class CheckpointExistsError(FastloadError, FileExistsError):
    """Another writer's checkpoint is there, and stays."""


class ServiceError(FastloadError, RuntimeError):
    """The cache service could not be started or reached, or broke the protocol."""


class WorkerError(FastloadError, RuntimeError):
    """A worker process of a loader died, or raised what cannot be pickled; its message names signal and cure."""


class WaitTimeoutError(FastloadError, TimeoutError):
    """A wait reached its deadline; the message names what was waited for. `saving` is the save of a checkpoint that
    goes on all the same (`checkpoint.Saving`); None: it was none that was waited for.
    """

    saving: Any = None


class StateError(FastloadError, ValueError):
    """A saved state that does not belong to this data set or loader."""


_BY_NAME: dict[str, type[FastloadError]] = {name: globals()[name] for name in __all__}


def to_wire(error: BaseException) -> tuple[str, str]:
    """The name and message under which `error` crosses the socket; a foreign error becomes a `ServiceError`."""
    name = type(error).__name__
    if name in _BY_NAME:
        return name, str(error)
    return "ServiceError", redact(f"{name} in the cache service: {error}")


def from_wire(name: str, message: str) -> FastloadError:
    """The exception that `to_wire` described."""
    return _BY_NAME.get(name, ServiceError)(message)
