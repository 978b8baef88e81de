"""The catalog: which objects the chunk files are of, and what is pinned, in one SQLite file of the cache directory.

Chunk files say by a hash which bytes they hold. The catalog says what that stands for: URL (without credentials), size,
ETag, data set and last use of each object that the disk holds or a pin names; and the pins themselves, which outlive
their consumers. docs/format.md has the tables.

It is a convenience for people and a memory for pins, and never in the way: what is not in it is "unknown", and a file
that is damaged, or of a newer fastload, is set aside and made anew. The service is its only writer, in one thread. Who
only looks opens it read-only, at any time, also beside the service: the file is in WAL mode, so that readers hold up
no writer. All that is read is checked, since the file may hold anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastload.cache.key import OBJECT_ID_BYTES
from fastload.errors import CacheError

NAME = "catalog.sqlite"
ASIDE = "catalog.damaged"
UNKNOWN = "(unknown)"  # the data set of what it does not name
SCHEMA = 1
_APPLICATION = 0x464C_4341  # "FLCA"
# How long another process may hold the file before a call gives up: well below what counts as a disk that hangs.
_BUSY_S = 2.0
_TABLES = """
CREATE TABLE objects (id BLOB PRIMARY KEY, url TEXT NOT NULL, size INTEGER NOT NULL, etag TEXT, data_set TEXT,
    used_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE pins (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, ttl_s REAL NOT NULL,
    quota_bytes INTEGER NOT NULL, used_at REAL NOT NULL);
CREATE TABLE pin_objects (pin INTEGER NOT NULL, id BLOB NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (pin, id))
    WITHOUT ROWID;
"""
# What SQLite answers where the file cannot be used just now; all else means that it is not what was written.
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_AUTH,
    }
)
_Result = TypeVar("_Result")


class CatalogError(CacheError):
    """The catalog cannot be used just now: locked, on a full disk, or not to be opened."""


class CatalogDamagedError(CatalogError):
    """It is no catalog, or one of a newer fastload."""


@dataclass(frozen=True, slots=True)
class CatalogObject:
    """One version of one object."""

    object_id: bytes
    url: str  # without credentials
    size: int
    etag: str | None
    data_set: str | None  # the name that a consumer gave it; None: its folder
    used_at: float  # since 1970

    @property
    def set_name(self) -> str:
        """Its data set where no pin names it."""
        return self.data_set or folder_of(self.url)


@dataclass(frozen=True, slots=True)
class CatalogPin:
    """One pin; `used_at` is since 1970."""

    name: str
    sizes: dict[bytes, int]
    ttl_s: float
    quota_bytes: int
    used_at: float


@dataclass(frozen=True, slots=True)
class Changes:
    """What one transaction writes."""

    objects: Sequence[CatalogObject] = ()
    forgotten: Sequence[bytes] = ()
    pins: Sequence[CatalogPin] = ()  # each in place of that of its name
    unpinned: Sequence[str] = ()
    pin_uses: dict[str, float] = field(default_factory=dict)


def folder_of(url: str) -> str:
    """The folder of an object in its store, with a slash at the end."""
    path, _, _ = url.partition("?") if url.startswith(("http://", "https://")) else (url, "", "")
    return path.rpartition("/")[0] + "/"


class Catalog:
    """The catalog of one directory. For one thread at a time; `open` before all else, again after an error.

    All raise CatalogError where the file cannot be used now, and CatalogDamagedError where it is to be set aside.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self._directory, self._read_only = directory, read_only
        self._path = directory / NAME
        self._connection: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def exists(self) -> bool:
        """Whether there is a file. OSError is no file."""
        return os.path.lexists(self._path)

    def open(self) -> None:
        """Open the file, which is made if it is not there. With `read_only` it has to be there."""
        if self._connection is None:
            self._connection = self._do(self._opened)

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?{self._mode()}",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            ((version,),) = connection.execute("PRAGMA user_version")
            ((application,),) = connection.execute("PRAGMA application_id")
            if (version, application) == (0, 0) and not self._read_only:
                self._make(connection)
            elif (version, application) != (SCHEMA, _APPLICATION):
                raise CatalogDamagedError(_what_it_is(version, application))
            if not self._read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
            # Reads all that a query needs of the schema, so that what lacks tables is found out here.
            connection.execute("SELECT id, url, size, etag, data_set, used_at FROM objects LIMIT 1").fetchone()
            connection.execute("SELECT number, name, ttl_s, quota_bytes, used_at FROM pins LIMIT 1").fetchone()
            connection.execute("SELECT pin, id, size FROM pin_objects LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _mode(self) -> str:
        if not self._read_only:
            return "mode=rwc"
        # Where no write-ahead log is left to be read, SQLite need not make one to look.
        has_log = any(os.path.lexists(f"{self._path}{ending}") for ending in ("-wal", "-shm"))
        return "mode=ro" if has_log else "mode=ro&immutable=1"

    def _make(self, connection: sqlite3.Connection) -> None:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise CatalogDamagedError("it is another program's")
        os.chmod(self._path, 0o600)
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file. May be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):  # nothing is under way: all that was committed is there
                connection.close()

    def set_aside(self) -> None:
        """Put a file that is no catalog out of the way, in place of the one before. OSError where that fails."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._directory / ASIDE)
        for ending in ("-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path.with_name(NAME + ending))

    # Reading

    def pins(self) -> list[CatalogPin]:
        """All pins."""
        return self._do(lambda: list(self._read_pins()))

    def _read_pins(self) -> Iterator[CatalogPin]:
        rows = self._db.execute("SELECT number, name, ttl_s, quota_bytes, used_at FROM pins ORDER BY number").fetchall()
        for number, *fields in rows:
            name, ttl_s, quota_bytes, used_at = fields
            if not (isinstance(name, str) and _are_numbers(ttl_s, quota_bytes, used_at)):
                raise CatalogDamagedError(f"pin {number} is none")
            objects = self._db.execute("SELECT id, size FROM pin_objects WHERE pin = ?", (number,))
            sizes = {_checked_id(key): _checked_size(size) for key, size in objects}
            yield CatalogPin(name, sizes, float(ttl_s), int(quota_bytes), float(used_at))

    def objects(self, after: bytes = b"", limit: int = -1) -> list[CatalogObject]:
        """So many of the objects, by their ids, behind `after`."""
        query = "SELECT id, url, size, etag, data_set, used_at FROM objects WHERE id > ? ORDER BY id LIMIT ?"
        return self._do(lambda: [_checked(row) for row in self._db.execute(query, (after, limit))])

    def find(self, what: Iterable[str]) -> set[bytes]:
        """The ids of what is called so: by URL, by a prefix of URLs that ends in a slash, or by a data set's name."""
        return self._do(lambda: {key for each in what for key in self._find(each)})

    def _find(self, each: str) -> Iterator[bytes]:
        rows = self._db.execute("SELECT id FROM objects WHERE url = ? OR data_set = ?", (each, each)).fetchall()
        if each.endswith("/"):
            below = each, each[:-1] + "0"  # which is the character after the slash
            rows += self._db.execute("SELECT id FROM objects WHERE url >= ? AND url < ?", below).fetchall()
        return (_checked_id(key) for (key,) in rows)

    # Writing

    def write(self, changes: Changes) -> None:
        """All of it or nothing."""
        self._do(lambda: self._write(changes))

    def _write(self, changes: Changes) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("DELETE FROM objects WHERE id = ?", [(key,) for key in changes.forgotten])
            db.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", map(_fields, changes.objects))
            for name in [*changes.unpinned, *(pin.name for pin in changes.pins)]:
                db.execute("DELETE FROM pin_objects WHERE pin IN (SELECT number FROM pins WHERE name = ?)", (name,))
                db.execute("DELETE FROM pins WHERE name = ?", (name,))
            for pin in changes.pins:
                values = (pin.name, pin.ttl_s, pin.quota_bytes, pin.used_at)
                made = db.execute("INSERT INTO pins (name, ttl_s, quota_bytes, used_at) VALUES (?, ?, ?, ?)", values)
                rows = ((made.lastrowid, key, size) for key, size in pin.sizes.items())
                db.executemany("INSERT INTO pin_objects VALUES (?, ?, ?)", rows)
            uses = [(at, name) for name, at in changes.pin_uses.items()]
            db.executemany("UPDATE pins SET used_at = ? WHERE name = ?", uses)
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # some errors have ended the transaction already
                db.execute("ROLLBACK")
            raise

    # Inside

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise CatalogError("it is not open")
        return self._connection

    def _do(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _PASSING:
                raise CatalogError(str(error)) from error
            raise CatalogDamagedError(str(error)) from error
        except (UnicodeDecodeError, OverflowError) as error:
            raise CatalogDamagedError(str(error)) from error
        except CacheError:
            raise
        except OSError as error:
            raise CatalogError(str(error)) from error


def _fields(each: CatalogObject) -> tuple[Any, ...]:
    return each.object_id, _text(each.url), each.size, _text(each.etag), _text(each.data_set), each.used_at


def _text(text: str | None) -> str | None:
    """As SQLite takes it, which is Unicode: a file name that is none shows its bytes."""
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _what_it_is(version: object, application: object) -> str:
    if application == _APPLICATION:
        return f"it is of a newer fastload (version {version}, where this one knows {SCHEMA})"
    return "it is another program's"


def _checked(row: tuple[Any, ...]) -> CatalogObject:
    key, url, size, etag, data_set, used_at = row
    is_right = (
        type(key) is bytes
        and len(key) == OBJECT_ID_BYTES
        and type(url) is str
        and type(size) is int
        and size >= 0
        and (etag is None or type(etag) is str)
        and (data_set is None or type(data_set) is str)
        and type(used_at) is float
        and 0.0 <= used_at < math.inf
    )
    if not is_right:
        raise CatalogDamagedError("an object in it is none")
    return CatalogObject(key, url, size, etag, data_set, used_at)


def _checked_id(key: object) -> bytes:
    if not isinstance(key, bytes) or len(key) != OBJECT_ID_BYTES:
        raise CatalogDamagedError("an object id in it is none")
    return key


def _checked_size(size: object) -> int:
    if not isinstance(size, int) or size < 0:
        raise CatalogDamagedError(f"a size in it is {size!r}")
    return size


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values)
