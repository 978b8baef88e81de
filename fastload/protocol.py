"""What consumers and the cache service say to each other: framed msgpack over a Unix stream socket.

A frame is a length (u32, little endian, at most `FRAME_BYTES_MAX`) and one msgpack array, whose first item names the
message and whose others are its fields in order. Everything is batched (a message speaks of many chunks), and nothing
is answered that the next message would answer anyway. Lists that can grow with the data set (`Attach`, `Resolved`,
`Indexes`) travel in pieces, the last of which says so.

Two rules keep leases exact although both sides speak at once:

- A `Want` carries a *serial*, and the `Grants` or `Failed` that answers it repeats that. A consumer takes only the
  answer to its latest `Want` of a chunk, so that a grant that crosses a `Release` on its way is never used.
- State changes and their messages happen in the same order on each side, and a socket keeps order. A `Recall` needs no
  serial for that reason: it speaks of the lease that the consumer has when it arrives, or of none.

`docs/protocol.md` describes the conversation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import msgspec

from fastload.cache.policy import PolicyName
from fastload.errors import ServiceError
from fastload.snapshot import Snapshot
from fastload.store.table import ObjectRows as ObjectRows

VERSION = 7
FRAME_BYTES_MAX = 64 << 20

# Rows of objects in one piece: some megabytes of msgpack, a few tens of milliseconds of work for the receiver.
OBJECTS_PER_PIECE = 10_000
# Index bytes in one piece; one index alone may be larger, up to `INDEX_BYTES_MAX`.
INDEX_BYTES_PER_PIECE = 8 << 20
INDEX_BYTES_MAX = FRAME_BYTES_MAX - 4096

# Indexes that one consumer makes at a time while others wait for them.
INDEXES_TO_MAKE = 64

# Sample counts asked for in one message: a fraction of a second's work for the service.
COUNTS_PER_REQUEST = 100_000

# Packed objects whose size is asked for in one message: a second's requests to a store.
UNPACKED_SIZES_PER_REQUEST = 256
# In place of the size of one that cannot be unpacked.
NO_SIZE = -2

# Where a granted chunk had to come from.
SOURCE_RAM, SOURCE_DISK, SOURCE_REMOTE = 0, 1, 2
SOURCES = ("ram", "disk", "remote")

# Descriptors that ride on one message; the kernel allows a few more.
FDS_MAX = 200

# How safe a checkpoint is; what has reached one of these has reached those before.
Level = Literal["memory", "disk", "store"]
LEVELS: tuple[Level, ...] = get_args(Level)

_LENGTH = struct.Struct("<I")


class ConversationError(ServiceError):
    """The peer sent what makes no sense here: it runs another version of fastload, or is another program."""


# The name of a pin or a data set.
SetName = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The base of all messages."""


# From the consumer


class Hello(Message, tag="hello"):
    """The first message. `store` is what the consumer's environment says of stores; it never touches a disk.

    `limits` are those of the directory that its user has just set, by name (see `CacheLimits`). Consumers with the same
    `group`, which is the process group, count as one run in the history; `program` is the name of what runs.
    """

    version: int
    pid: int
    name: str
    store: dict[str, Any]
    limits: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    group: int = 0
    program: Annotated[str, msgspec.Meta(max_length=255)] = ""

    def __repr__(self) -> str:
        return f"Hello({self.version}, {self.pid}, {self.name!r}, store=<hidden>)"


class Credentials(Message, tag="credentials"):
    """The store options, read again after a denial."""

    store: dict[str, Any]

    def __repr__(self) -> str:
        return "Credentials(<hidden>)"


class Resolve(Message, tag="resolve"):
    """Which objects are these? Answered by `Resolved` or `RequestFailed`.

    Under a prefix, those whose names end in one of `endings`, and of what else is listed those called one of `beside`.
    With `present`, `urls` are names of objects, and those that are not there are left out.
    """

    request: int
    urls: list[str]
    endings: list[str]
    beside: list[str]
    present: bool = False


class Open(Message, tag="open"):
    """Which version of the object is there? It joins the end of my list. Answered by `Opened` or `RequestFailed`."""

    request: int
    url: str


class Attach(Message, tag="attach"):
    """A piece of the consumer's object list, which numbers its chunks."""

    first: bool
    last: bool
    rows: ObjectRows


class WarmTerms(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """On which terms a warm-up has the cache filled: no faster than `bytes_per_s` (0: as fast as jobs leave room for),
    before others by `deadline` (seconds since 1970; 0: none), then by `priority`, then by age. With `goes_on`, an
    object that cannot be fetched does not end it.
    """

    bytes_per_s: Annotated[int, msgspec.Meta(ge=0)] = 0
    priority: int = 0
    deadline: float = 0.0
    goes_on: bool = False


class SetPlan(Message, tag="plan"):
    """The order in which objects will be read, all chunks of each; replaces the plan before. Empty: no plan.

    With `warm`, fill the cache with them: a warm-up on these `terms`, and behind what jobs read. A job that has its own
    data kept names none.
    """

    objects: list[int]
    epoch: int
    warm: bool
    position: int
    terms: WarmTerms | None = None


class Keep(Message, tag="keep"):
    """These are the objects that I read again and again, and by which policy to keep them; replaces the keep list
    before. Empty: none.
    """

    objects: list[int]
    policy: PolicyName


class Uses(Message, tag="uses"):
    """Which chunks of a warm plan will be read, in this order: their positions in it, int32 in little-endian. The first
    of them is use number `first`; they follow the ones of the `Uses` before.
    """

    first: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    positions: bytes


class Advance(Message, tag="advance"):
    """Nothing of the plan below this chunk position is needed any more; of a plan with `Uses`, no use below."""

    position: int


class Want(Message, tag="want"):
    """Lease me these. `urgent`: a thread waits for them."""

    chunks: list[int]
    serial: int
    urgent: bool


class Release(Message, tag="release"):
    """I no longer hold or want these."""

    chunks: list[int]


class Pinned(Message, tag="pinned"):
    """These were recalled while in use; `Release` follows when the use ends."""

    chunks: list[int]


class GetIndexes(Message, tag="get_indexes"):
    """The stored indexes of these objects; answered by `Indexes`, at once or when another consumer has made some."""

    request: int
    objects: list[int]


class PutIndex(Message, tag="put_index"):
    """Keep this index of an object."""

    object_no: int
    data: bytes


class GiveUpIndexes(Message, tag="give_up_indexes"):
    """I make none of these after all."""

    objects: list[int]


class PutCounts(Message, tag="put_counts"):
    """How many samples these objects hold, as found by another node; `counts` are int64, little-endian."""

    objects: list[int]
    counts: bytes


class GetCounts(Message, tag="get_counts"):
    """How many samples these objects hold; answered by `Counts`."""

    request: int
    objects: list[int]


class GetUnpackedSizes(Message, tag="get_unpacked_sizes"):
    """How many bytes these packed objects have unpacked? Answered by `Counts`, within a minute: -1 for those of which
    that is still being found out, and which may be asked for again, `NO_SIZE` for those that cannot be unpacked. One of
    these that is asked for alone is answered by `RequestFailed`, which says what is wrong with it.
    """

    request: int
    objects: list[int]


class Clear(Message, tag="clear"):
    """Empty the cache, save for what is in use and what is pinned. With `history` what runs read goes as well, with
    `pins` all pins and what they hold. Answered by `Cleared`.
    """

    request: int
    history: bool
    pins: bool = False


class Pin(Message, tag="pin"):
    """Keep these objects on disk under this name, in place of those that it stood for, until they were not used for
    `ttl_s` seconds (0: until they are unpinned). They may have `quota_bytes` in all (0: as much as there is). Answered
    by `Done` once that is stored, with `byte_count`; by `RequestFailed` where it is more than may be.
    """

    request: int
    name: SetName
    objects: list[int]
    ttl_s: Annotated[float, msgspec.Meta(ge=0, le=1e10)]
    quota_bytes: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Label(Message, tag="label"):
    """These objects are the data set of this name, in what operators are shown."""

    name: SetName
    objects: list[int]


class Held(Message, tag="held"):
    """How much of my objects the cache holds. Answered by `Done` with `byte_count` of all of them, and of these
    `ram_bytes`, `disk_bytes`, `held_bytes` (in either, counted once) and `pinned_bytes` (that pins name, held or not).
    """

    request: int


class Stats(Message, tag="stats"):
    """Answered by `StatsReply`."""

    request: int


# What a report may hold: whatever views show of it can be written as JSON.
Reported = bool | int | float | str | dict[str, bool | int | float | str | list[float]]


class Report(Message, tag="report"):
    """Figures of the consumer, which the service shows with its own: docs/stats.md lists what a loader says."""

    values: dict[str, Reported]


class Ping(Message, tag="ping"):
    """A heartbeat. Answered by `Pong`, at once."""


Attempt = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=10**7)]
Span = tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]  # start and length


class Begin(msgspec.Struct, array_like=True, frozen=True):
    """How an attempt of one rank is to be begun in the store: whether in place of a checkpoint that is there, when the
    save began (seconds since 1970), and its metric.
    """

    overwrite: bool
    began_s: float
    metric: float | None = None


class Save(Message, tag="save"):
    """Carry a rank's part of a checkpoint to the store, into the folder of this URL, which ends in a slash. Answered by
    `SaveState`, each time that more of it is safe.

    The descriptor of the image, a memfd of `image_bytes`, rides on the first byte: in it lie the `segments`, as they
    are to be stored, and the `record` of the part, without the checksums of their blocks. With `image_bytes` 0 there is
    none: it was given back, and this only asks for what becomes of the save. `commits`: commit the attempt, too.
    `begin`: begin it before, since the store has not answered the trainer in time.
    """

    folder: Annotated[str, msgspec.Meta(pattern="/$")]
    attempt: Attempt
    rank: Rank
    image_bytes: Annotated[int, msgspec.Meta(ge=0)]
    segments: list[Span]
    record: Span
    commits: bool
    begin: Begin | None = None


class TakeBack(Message, tag="take_back"):
    """I want to fill the image of this save anew. Answered by `Returned`, once it is not the only copy."""

    attempt: Attempt
    rank: Rank


# Bytes of an object that are asked for at once.
LOAD_BYTES_MAX = 16 << 20


class Load(Message, tag="load"):
    """I am going to read from this object of a checkpoint, which has `size` bytes: hold memory for it that all who read
    it share. Answered by `LoadMemory`, or by `RequestFailed`: then I read it by myself.

    `version` is its ETag and time of change (`ObjectInfo`); None: whichever is there, since I verify what I read.
    """

    request: int
    url: str
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 44)]
    version: tuple[str | None, int] | None = None


class LoadRange(Message, tag="load_range"):
    """Have these bytes of an object in its memory; `load` is the request of the `Load` that named it. Answered by
    `Loaded` when they are there, or by `RequestFailed`.
    """

    request: int
    load: int
    start: Annotated[int, msgspec.Meta(ge=0)]
    length: Annotated[int, msgspec.Meta(ge=1, le=LOAD_BYTES_MAX)]


# From an operator, which is connected and no consumer: it starts, keeps and holds up nothing


class Observe(Message, tag="observe"):
    """The first message of an operator, instead of a hello. Answered by `Observed`."""

    version: int
    pid: int
    name: str


class Watch(Message, tag="watch"):
    """Send me what the node is and does, as a `Shown`: now, and then each `every_s` seconds (0: now only)."""

    request: int
    every_s: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class HandOver(Message, tag="hand_over"):
    """A daemon is to serve in your place: end, as soon as what runs allows. Answered by `Done` before that, or by
    `RequestFailed` where a daemon serves already.
    """

    request: int


class SubmitJob(Message, tag="submit_job"):
    """Warm this, beside what the configuration names: a `[[data]]` table (`fastload/daemon/config.py`). Answered by
    `Done` with its `id` once it is kept.
    """

    request: int
    job: dict[str, Any]


class CancelJob(Message, tag="cancel_job"):
    """End this job; what it warmed stays. Answered by `Done`."""

    request: int
    id: str


class RetryJob(Message, tag="retry_job"):
    """Run this job again now, whatever came of it before. Answered by `Done`."""

    request: int
    id: str


class Unpin(Message, tag="unpin"):
    """End pins: those of these names, and what these URLs and prefixes (which end in a slash) name of all pins. Also
    from a consumer. Answered by `Done`, with `byte_count`, of all objects that no pin names any more, and `names` of
    the pins that ended or became smaller.
    """

    request: int
    what: list[str]


class Evict(Message, tag="evict"):
    """Remove what is called so, by URL, prefix (which ends in a slash) or data set, from both tiers. Answered by `Done`
    with `freed_bytes`, and what stays: `in_use_bytes` (leased, or being loaded) and `pinned_bytes`.
    """

    request: int
    what: list[str]


class Verify(Message, tag="verify"):
    """Read what is on disk of what is called so (as for `Evict`; of an empty list everything), and check it. With
    `repair` remove what is damaged, so that it is fetched again. Answered by `Verified`, several times.
    """

    request: int
    what: list[str]
    repair: bool


class Borrow(Message, tag="borrow"):
    """Lend me the images of this attempt, to read, as long as I am connected. Answered by `Lent`."""

    request: int
    attempt: Attempt


# From the service


class Observed(Message, tag="observed"):
    """Answers `Observe`. A daemon stays when the last consumer has gone."""

    version: int
    service_id: bytes
    pid: int
    is_daemon: bool = False


class Shown(Message, tag="shown"):
    """Answers `Watch`, each time."""

    request: int
    snapshot: Snapshot


class Done(Message, tag="done"):
    """Answers a request that was carried out, with what came of it."""

    request: int
    values: dict[str, Any]


class Verified(Message, tag="verified"):
    """How far a `Verify` is, once a second and at its end, which has `finished`. `damaged` are the chunks found since
    the last message, as their files are called (docs/format.md); `skipped_chunks` were not there any more, or could not
    be read.
    """

    request: int
    done_chunks: int
    total_chunks: int
    done_bytes: int
    skipped_chunks: int
    damaged_chunks: int
    damaged: list[str]
    finished: bool


class Welcome(Message, tag="welcome"):
    """Answers `Hello`; the arena's descriptor rides on its first byte."""

    version: int
    service_id: bytes
    pid: int
    chunk_bytes: int
    buffer_count: int
    troubles: list[str]


class Refused(Message, tag="refused"):
    """Answers `Hello`, or whatever the service cannot take; the socket closes after it."""

    name: str
    message: str


class Grants(Message, tag="grants"):
    """Leases: chunk `chunks[i]` lies in buffer `buffers[i]`, where it came from `SOURCES[sources[i]]`."""

    chunks: list[int]
    serials: list[int]
    buffers: list[int]
    sources: list[int]


class Failed(Message, tag="failed"):
    """These chunks could not be had, for one reason; they no longer count as wanted."""

    chunks: list[int]
    serials: list[int]
    name: str
    message: str


class Recall(Message, tag="recall"):
    """The room is needed: release these, or say `Pinned`."""

    chunks: list[int]


class Resolved(Message, tag="resolved"):
    """A piece of the answer to `Resolve`."""

    request: int
    rows: ObjectRows
    last: bool


class Opened(Message, tag="opened"):
    """Answers `Open`: the object is number `object_no` of the consumer's list."""

    request: int
    object_no: int
    url: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    etag: str | None
    mtime_ns: int


class Indexes(Message, tag="indexes"):
    """A piece of the answer to `GetIndexes`. Indexes in `make` are not stored: this consumer makes them and sends each,
    or gives it up, while others wait for them. Those in neither list are being made by another, or too many: ask again.
    """

    request: int
    objects: list[int]
    data: list[bytes]
    make: list[int]
    last: bool


class Counts(Message, tag="counts"):
    """Answers `GetCounts` or `GetUnpackedSizes`: one number for each object, as it was asked for, -1 for one where it
    is not known; int64 in little-endian.
    """

    request: int
    counts: bytes


class Cleared(Message, tag="cleared"):
    """Answers `Clear`: how many bytes that freed in RAM and on disk."""

    request: int
    byte_count: int


class StatsReply(Message, tag="stats_reply"):
    """Answers `Stats`."""

    request: int
    values: dict[str, Any]


class RequestFailed(Message, tag="request_failed"):
    """Answers a request that could not be served."""

    request: int
    name: str
    message: str


class Trouble(Message, tag="trouble"):
    """Something about the cache that its users should know, once."""

    message: str


class Progress(Message, tag="progress"):
    """How far a warm plan is. `held_*` counts what the cache holds now; `error_name` is empty while all is well.

    Of a plan that goes on, `failed_objects` counts those that could not be had; when it is finished, `failures` has the
    URL of each, up to a thousand, with its error's name and message.
    """

    done_chunks: int
    done_bytes: int
    total_chunks: int
    total_bytes: int
    held_chunks: int
    held_bytes: int
    fetched_bytes: int
    finished: bool
    error_name: str
    error_message: str
    failed_objects: int = 0
    failures: list[tuple[str, str, str]] = []


class SaveState(Message, tag="save_state"):
    """How far a save is: which level it has reached ("": none), and how many bytes of it are on disk and in the store.

    `no_disk` says why it will not reach the disk. With an error it will reach nothing more, unless it `goes_on`: it is
    tried again from time to time, and after `AccessDeniedError` with other `Credentials`. `reason` is why it was last
    put off.
    """

    attempt: str
    rank: int
    level: Level | Literal[""]
    disk_bytes: int
    store_bytes: int
    no_disk: str = ""
    error_name: str = ""
    error_message: str = ""
    goes_on: bool = False
    reason: str = ""


class Returned(Message, tag="returned"):
    """Answers `TakeBack`: the service reads the image no more."""

    attempt: str
    rank: int


class LoadMemory(Message, tag="load_memory"):
    """Answers `Load`: the memory, a sealed memfd as large as the object, whose descriptor rides on the first byte. Of
    what it holds, only what was `Loaded` means anything; that does not change any more.
    """

    request: int


class Loaded(Message, tag="loaded"):
    """Answers `LoadRange`."""

    request: int


class Lent(Message, tag="lent"):
    """Answers `Borrow`: rank and segments of each image; their descriptors ride on the first byte, in this order."""

    request: int
    images: list[tuple[int, list[Span]]]


class Pong(Message, tag="pong"):
    """Answers `Ping`."""


FromConsumer = (
    Hello
    | Credentials
    | Resolve
    | Open
    | Attach
    | SetPlan
    | Keep
    | Uses
    | Advance
    | Want
    | Release
    | Pinned
    | GetIndexes
    | PutIndex
    | GiveUpIndexes
    | PutCounts
    | GetCounts
    | GetUnpackedSizes
    | Clear
    | Pin
    | Unpin
    | Label
    | Held
    | Stats
    | Report
    | Ping
    | Save
    | TakeBack
    | Load
    | LoadRange
)
FromOperator = Observe | Watch | HandOver | SubmitJob | CancelJob | RetryJob | Clear | Unpin | Evict | Verify | Borrow
FromService = (
    Welcome
    | Observed
    | Shown
    | Done
    | Verified
    | Refused
    | Grants
    | Failed
    | Recall
    | Resolved
    | Opened
    | Indexes
    | Counts
    | Cleared
    | StatsReply
    | RequestFailed
    | Trouble
    | Progress
    | Pong
    | SaveState
    | Returned
    | LoadMemory
    | Loaded
    | Lent
)

_encoder = msgspec.msgpack.Encoder()
_decoder_of_service: msgspec.msgpack.Decoder[FromConsumer] = msgspec.msgpack.Decoder(FromConsumer)
_decoder_of_operator: msgspec.msgpack.Decoder[FromOperator] = msgspec.msgpack.Decoder(FromOperator)
_raw_decoder: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])
_decoder_of_consumer: msgspec.msgpack.Decoder[FromService] = msgspec.msgpack.Decoder(FromService)


def frame(message: Message) -> bytearray:
    """`message`, ready for the socket; `ServiceError` where it is larger than a frame may be."""
    data = bytearray(_LENGTH.size)
    _encoder.encode_into(message, data, _LENGTH.size)
    payload_bytes = len(data) - _LENGTH.size
    if payload_bytes > FRAME_BYTES_MAX:
        raise ServiceError(
            f"a {type(message).__name__} message of {payload_bytes} bytes is more than a frame may hold "
            f"({FRAME_BYTES_MAX})"
        )
    _LENGTH.pack_into(data, 0, payload_bytes)
    return data


def first_words(payload: bytes | memoryview) -> tuple[str, int] | None:
    """The name and the version of a first message of whatever version; None where it is none."""
    try:
        tag, version, *_ = _raw_decoder.decode(payload)
        name = msgspec.msgpack.decode(tag, type=str)
        return (name, msgspec.msgpack.decode(version, type=int)) if name in ("hello", "observe") else None
    except (msgspec.MsgspecError, ValueError):
        return None


def from_consumer(payload: bytes | memoryview) -> FromConsumer:
    """The consumer's message; `ConversationError` where it is none."""
    try:
        return _decoder_of_service.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConversationError(f"not a message of a consumer: {error}") from error


def from_operator(payload: bytes | memoryview) -> FromOperator:
    """The operator's message; `ConversationError` where it is none."""
    try:
        return _decoder_of_operator.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConversationError(f"not a message of an operator: {error}") from error


def from_service(payload: bytes | memoryview) -> FromService:
    """The service's message; `ConversationError` where it is none."""
    try:
        return _decoder_of_consumer.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConversationError(f"not a message of the cache service: {error}") from error


class FrameReader:
    """Cuts a stream of bytes into frames. Not for several threads."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    @property
    def is_between(self) -> bool:
        """Whether all that came were whole frames."""
        return not self._bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that `data` completes; `ConversationError` for a length beyond the maximum."""
        self._bytes += data
        start = 0
        try:
            while len(self._bytes) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._bytes, start)
                if length > FRAME_BYTES_MAX:
                    raise ConversationError(f"a frame of {length} bytes, more than may be ({FRAME_BYTES_MAX})")
                end = start + _LENGTH.size + length
                if len(self._bytes) < end:
                    break
                payload = bytes(memoryview(self._bytes)[start + _LENGTH.size : end])
                start = end
                yield payload
        finally:
            del self._bytes[:start]
