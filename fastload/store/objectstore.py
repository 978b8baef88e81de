"""Object storage through obstore: S3, Google, Azure.

obstore lists and finds credentials. Its own retries are off, since ours stand around it, and its runtime
does not survive a fork: a child whose parent had used it would hang without an error, and gets a `StoreError`.

Bytes take one of two ways. From S3 they come by requests of our own straight into the caller's buffer, and go so out of
it (see `direct`). Everything else streams through obstore and is copied, piece by piece, so that answers in flight do
not pile up. What obstore writes goes in one request each and out of the caller's memory. Over TLS, which authenticates
every byte, S3 is not sent a SHA-256 of them as well: that
takes two thirds of an upload's CPU-seconds (1.3 a GB with it, 0.4 without, receiver included).

As whom a store is asked, in words: which kind of credentials, and where they were found. Never their values.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store, from_url
from typing_extensions import Buffer

from fastload.errors import (
    AccessDeniedError,
    ConfigError,
    StoreError,
    StoreUnavailableError,
    WriteConflictError,
)
from fastload.lifecycle import is_inherited
from fastload.redaction import showable
from fastload.store import settings, watch
from fastload.store.answers import (
    BadReplyError,
    NoCredentialsError,
    Refusal,
    UnreachableError,
    changed,
    is_doubtful,
    is_strong,
    same_etag,
    truncated,
    unreachable,
    unresolved,
    without_credentials,
)
from fastload.store.direct import DEFAULT_REGION, EXPRESS, DirectBucket, UnverifiedError, direct_s3_bucket, place
from fastload.store.environment import as_bool
from fastload.store.options import StoreOptions
from fastload.store.proxies import for_obstore, proxy_for
from fastload.store.replies import Reply, asked, bad_reply, check
from fastload.store.types import ObjectInfo
from fastload.store.urls import key_of, scheme

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta
    from obstore.store import ObjectStore as ObstoreStore

_log = logging.getLogger("fastload.store")
SCHEMES = frozenset({"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss"})
# Pieces of the stream: smaller ones cost calls, larger ones are gathered and copied once more inside obstore.
_PIECE_BYTES = 256 * 1024
_LIST_PAGE = 1000
# An upload may take as long. obstore's timeout of reads runs from the request on, while the body is being sent, too.
_UPLOAD_S = 900
_ASKED = re.compile(r"(?P<token>token request: )?Error performing (?P<method>[A-Z]+) (?P<url>\S+) in ")
_NO_TOKEN = re.compile(r"(Failed to read (EKS )?token file .*|AWS_EC2_METADATA_DISABLED .*)")
_STATUS = re.compile(r"status code: (\d{3})")
_CAUSE = re.compile(r'(?:message|error): "([^"]{1,200})"')
# What obstore calls replies that do not fit the request, or that it cannot read: they are the network's fault.
_BAD_REPLY = re.compile(
    r"\b(NotPartial|NoContentRange|ParseContentRange|InvalidContentRange|UnexpectedRange|InvalidListResponse"
    r"|MissingContentLength|InvalidContentLength|MissingLastModified|InvalidLastModified|MissingEtag)\b"
)
# An answer that all is well, with an error in it: what became of one of the objects to delete, and of all of them.
_NOT_DELETED = re.compile(r"DeleteObjects request failed .*\(code: (\w+)\)")
_NOWHERE = "redirect without LOCATION"  # what S3 answers where a bucket is in another region
_ERROR_WITHIN = "Server returned error response"
_RESOLVER = re.compile(r"Temporary failure|[Tt]ry again")  # glibc's words and musl's for EAI_AGAIN
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_KINDS: tuple[tuple[type[BaseException], int], ...] = (
    (FileNotFoundError, 404),
    (PermissionDeniedError, 403),
    (UnauthenticatedError, 401),
    (PreconditionError, 412),
)


# Refusals that may be of how a request is made, and not of what it is for.
_OF_THIS_WAY = (AccessDeniedError, StoreError, UnverifiedError)


class ObjectStore:
    """One bucket (or container) of an object storage; `root` is `s3://bucket`. See `Store` for the
    contract.
    """

    def __init__(self, root: str, options: StoreOptions) -> None:
        self._root = root
        self._options = options
        self._endpoint = endpoint_of(root, options)
        self._who = describe_credentials(scheme(root), options)
        store = _open(root, options, self._endpoint)
        self._lock = threading.Lock()
        self._store: ObstoreStore | None = store
        self._writers: dict[bool, ObstoreStore] = {}  # made by the first write; by whether bytes are hashed
        self._hashes_uploads = not (isinstance(store, S3Store) and self._endpoint.startswith("https:"))
        bucket = root.partition("://")[2]
        self._direct = direct_s3_bucket(bucket, options, store) if isinstance(store, S3Store) else None
        self._writes_directly = True  # until the store takes from obstore what it refuses so
        self._proxy = proxy_for(self._endpoint, dict(options.extra))

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """All objects whose URL starts with `prefix_url`, in the order of their keys."""
        with self._saying_who():
            found = self._list(prefix_url)
        yield from sorted(found, key=lambda info: info.url)

    def _list(self, prefix_url: str) -> Iterable[ObjectInfo]:
        prefix = key_of(prefix_url)
        # obstore's prefixes are whole folders, so one that ends within a name lists its folder. The
        # providers' own endpoints list in the order of the keys: there it begins just before the prefix and
        # ends behind it. Others (SeaweedFS) put `a/x` before `a-`, so there all of the folder is read.
        folder = prefix.rpartition("/")[0]
        ordered = not self._options.endpoint and not self._root.endswith(EXPRESS)
        offset = prefix[:-1] if ordered and len(prefix) > len(folder) + 1 else None
        found: dict[str, ObjectInfo] = {}
        wanted = f"what is in {folder or 'the bucket'}"
        within = "".join(f"{part}/" for part in folder.split("/") if part)  # as obstore writes it
        try:
            for page in obstore.list(self._opened(), folder or None, offset=offset, chunk_size=_LIST_PAGE):
                for meta in page:
                    path, info = meta["path"], self._info(meta)
                    if not path.startswith(within) or found.get(path, info) != info:
                        raise bad_reply(
                            prefix_url,
                            self._endpoint,
                            wanted,
                            f"{path[:200]}, which is outside of it or was listed twice",
                        )
                    if path.startswith(prefix):
                        found[path] = info
                if ordered and page and page[-1]["path"] > prefix and not page[-1]["path"].startswith(prefix):
                    break
        except (BaseError, OSError) as error:
            explained = self._explain(error, prefix_url, wanted)
            if isinstance(explained, BadReplyError):
                self._renew()
            raise explained from showable(error)
        return found.values()

    def head(self, url: str) -> ObjectInfo:
        with self._saying_who():
            return self._head(url)

    def _head(self, url: str) -> ObjectInfo:
        key = key_of(url)
        try:
            return self._info(obstore.head(self._opened(), key))
        except (BaseError, OSError, ValueError) as error:
            explained = self._explain(error, url)
            if isinstance(explained, UnreachableError):
                raise explained from showable(error)
            if isinstance(explained, BadReplyError):
                self._renew()
        # A HEAD's answer has no body to tell a missing bucket from a missing key, or a wrong secret from a
        # lacking right. A GET's has one.
        try:
            return self._info(obstore.get(self._opened(), key, options={"range": (0, 1)}).meta)
        except (BaseError, OSError, ValueError) as error:
            better = self._explain(error, url)
            raise better if type(better) is type(explained) else explained from showable(error)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `start`."""
        if start + len(out) > info.size:
            raise ConfigError(f"{info.url}: bytes {start}-{start + len(out)} are beyond its end ({info.size})")
        if len(out) == 0:
            return
        with self._saying_who():
            try:
                if (direct := self._direct) is None:
                    self._read_through_obstore(info, start, out)
                elif direct.signs_urls:
                    self._read_by_signed_url(direct, info, start, out)
                else:
                    direct.read_into(info, start, out)
            except StoreError as error:
                if is_doubtful(error):
                    self._renew()
                raise

    def put(self, url: str, data: Buffer) -> str | None:
        """Store `data` as the object at `url`."""
        direct = self._direct
        if direct is None or not direct.writes or not self._writes_directly:
            return self._put(url, data, "overwrite")
        with self._saying_who():
            try:
                return direct.put(url, memoryview(data).cast("B"))
            except BaseError as error:  # of obstore, which looked for credentials
                raise self._explain(error, url, "to write it") from showable(error)
            except StoreError as error:
                if is_doubtful(error):
                    self._renew()
                if type(error) not in _OF_THIS_WAY:
                    raise
                reason = str(error)
        # Of a policy that wants uploads signed with their hash, or no signed URLs, for example, or a redirect.
        etag = self._put(url, data, "overwrite")
        self._writes_directly = False
        _log.warning("%s is written through obstore, for more CPU time: %s", self._root, reason)
        return etag

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return self._put(url, data, "create")

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        if scheme(self._root) != "gs":
            return self._put(url, data, {"e_tag": etag})
        # Google compares the object's generation, of which there is one for each ETag.
        with self._saying_who():
            generation = self._generation(url, etag)
        return self._put(url, data, {"version": generation})

    def _put(self, url: str, data: Buffer, mode: Any) -> str | None:
        content = memoryview(data).cast("B")
        with self._saying_who():
            try:
                return self._put_once(url, content, mode)
            except AccessDeniedError:
                if self._hashes_uploads:
                    raise
            # There are buckets whose policy refuses what is signed without its hash, and nothing else.
            etag = self._put_once(url, content, mode, hashed=True)
        self._hashes_uploads = True
        _log.warning("%s refuses uploads without a hash, which are sent with one, for more CPU time", self._root)
        return etag

    def _put_once(self, url: str, content: memoryview, mode: Any, *, hashed: bool = False) -> str | None:
        try:
            writer = self._opened_to_write(hashed=hashed or self._hashes_uploads)
            return obstore.put(writer, key_of(url), content, mode=mode, use_multipart=False)["e_tag"]
        except (BaseError, OSError) as error:
            explained = self._explain_write(error, url, mode)
            if isinstance(explained, BadReplyError):
                self._renew()
            raise explained from showable(error)

    def _generation(self, url: str, etag: str) -> str:
        try:
            meta = obstore.head(self._opened(), key_of(url))
        except FileNotFoundError as error:
            raise _lost(url, "it is gone") from showable(error)
        except (BaseError, OSError) as error:
            raise self._explain(error, url) from showable(error)
        if not same_etag(meta["e_tag"], etag):
            raise _lost(url, f"its ETag was to be {etag} and is {meta['e_tag']}")
        return meta["version"] or ""

    def _explain_write(self, error: BaseException, url: str, mode: Any) -> StoreError | ConfigError:
        text = str(error)
        # S3 says so where two conditional writes meet, and means that this one is to be sent again.
        if "ConditionalRequestConflict" in text or "OperationAborted" in text:
            return StoreUnavailableError(f"{url}: another writes it at this moment; it is retried until the deadline")
        if "<Code>NoSuchBucket" in text:  # which obstore takes for a condition that does not hold
            return Refusal.from_body(404, text).error(url, self._endpoint)
        if isinstance(error, AlreadyExistsError | PreconditionError) and mode != "overwrite":
            return _lost(url, "it is there already" if mode == "create" else "it is no longer the version to replace")
        if isinstance(mode, dict) and isinstance(error, FileNotFoundError) and "ContainerNotFound" not in text:
            return _lost(url, "it is gone")
        if isinstance(error, NotSupportedError | NotImplementedError):
            return ConfigError(f"{url}: {text.splitlines()[0]}; check storage_options")  # conditional_put, say
        return self._explain(error, url, "to write it")

    def delete(self, url: str) -> None:
        """Delete the object at `url`."""
        with self._saying_who():
            try:
                obstore.delete(self._opened(), key_of(url))
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise self._explain(error, url) from showable(error)
            except (BaseError, OSError) as error:
                failed = _NOT_DELETED.search(str(error))
                if failed is None:
                    raise self._explain(error, url, "to delete it") from showable(error)
                if failed[1] != "NoSuchKey":
                    status = 403 if failed[1] == "AccessDenied" else 200
                    raise Refusal(status, failed[1]).error(url, self._endpoint) from showable(error)

    def close(self) -> None:
        """Let go of connections; obstore's go with its store, when the last request has ended."""
        with self._lock:
            self._store, self._writers, direct, self._direct = None, {}, self._direct, None
        if direct is not None:
            direct.close()

    def _renew(self) -> None:
        """What obstore asks next goes over new connections: only a store of its own has them."""
        try:
            store = _open(self._root, self._options, self._endpoint)
        except ConfigError as error:  # it could be opened once; why it cannot now must not hide what is renewed for
            _log.warning("%s: requests go on over the connections that there are: %s", self._root, error)
            return
        with self._lock:
            if self._store is not None:
                self._store, self._writers = store, {}

    @contextlib.contextmanager
    def _saying_who(self) -> Iterator[None]:
        """Within the block, an error of a denied or unanswered request says which credentials it was made with."""
        try:
            yield
        except NoCredentialsError:
            raise
        except (AccessDeniedError, UnreachableError) as error:
            raise type(error)(f"{error}; the request used {self._who}") from error.__cause__

    def _opened(self) -> ObstoreStore:
        if self._store is None:
            raise StoreUnavailableError(f"{self._root}: this store is closed")
        _check_not_forked(self._root)
        return self._store

    def _opened_to_write(self, *, hashed: bool) -> ObstoreStore:
        with self._lock:
            self._opened()
            if hashed not in self._writers:
                self._writers[hashed] = _open(self._root, self._options, self._endpoint, hashes_uploads=hashed)
            return self._writers[hashed]

    def _read_by_signed_url(self, direct: DirectBucket, info: ObjectInfo, start: int, out: memoryview) -> None:
        """There are buckets whose policy refuses signed URLs (s3:authType) and nothing else."""
        try:
            try:
                return direct.read_into(info, start, out)
            except AccessDeniedError:  # one reply is not to cost the bucket its faster way
                return direct.read_into(info, start, out)
        except BaseError as error:  # of obstore, which looked for credentials
            raise self._explain(error, info.url) from showable(error)
        except AccessDeniedError:
            self._read_through_obstore(info, start, out)
            if self._direct is direct:
                self._direct = None
                direct.close()
                _log.warning("%s refuses signed URLs and is read through obstore, for more CPU time", self._root)

    def _read_through_obstore(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        options: dict[str, Any] = {"range": (start, start + len(out))}
        if is_strong(info.etag):
            options["if_match"] = info.etag
        wanted, got = asked(info, start, len(out)), 0
        try:
            result = obstore.get(self._opened(), key_of(info.url), options=options)  # type: ignore[arg-type]
            watch.first_byte()
            check(_reply(result), info, start, len(out), self._endpoint)
            for piece in result.stream(min_chunk_size=_PIECE_BYTES):
                if watch.cancelled():
                    raise watch.given_up()
                view = memoryview(piece)
                if got + len(view) > len(out):
                    came = f"{_reply(result)}, and a body that continues after them"
                    raise bad_reply(info.url, self._endpoint, wanted, came)
                out[got : got + len(view)] = view
                got += len(view)
        except (BaseError, OSError, ValueError) as error:
            raise self._explain(error, info.url, wanted) from showable(error)
        if got != len(out):
            raise truncated(info.url, got, len(out), start)

    def _info(self, meta: ObjectMeta) -> ObjectInfo:
        return ObjectInfo(f"{self._root}/{meta['path']}", meta["size"], meta["e_tag"], _mtime_ns(meta))

    def _explain(self, error: BaseException, url: str, wanted: str = "its size and version") -> StoreError:
        """An exception of obstore as ours: its type or the status it quotes, and the code in the body it quotes.
        `wanted` is what was asked for.
        """
        if isinstance(error, StoreError):
            return error
        text = str(error)
        if (reason := self._lacks_credentials(text)) is not None:
            return without_credentials(url, self._endpoint, self._who, reason)
        quoted = _STATUS.search(text)
        status = next((status for kind, status in _KINDS if isinstance(error, kind)), 0)
        status = int(quoted[1]) if quoted else status
        if _NOWHERE in text:
            status = 301
        if status or _ERROR_WITHIN in text:
            return Refusal.from_body(status or 200, text).error(url, self._endpoint)
        if certificate := _CERTIFICATE.search(text):
            reason = f"its TLS certificate is not accepted ({certificate[1]}; root_certificate names another issuer)"
            return unreachable(url, self._endpoint, reason)
        if bad := _BAD_REPLY.search(text):
            came = f"what obstore reports as {bad[1]} ({text.splitlines()[0]})"
            # All of an object in place of a range: it may be another by now, which the reply would say.
            return (
                changed(url, f"requested {wanted}, received {came}")
                if bad[1] == "NotPartial"
                else bad_reply(url, self._endpoint, wanted, came)
            )
        if "dns error" in text:
            proxy = self._proxy.host if self._proxy is not None else ""
            return unresolved(url, self._endpoint, for_now=_RESOLVER.search(text) is not None, proxy=proxy)
        causes = _CAUSE.findall(text)
        if causes or "HTTP error" in text or "TimedOut" in text:
            return unreachable(url, self._endpoint, causes[-1] if causes else "the connection failed or timed out")
        return StoreError(f"{url}: {text.splitlines()[0]}; check the credentials and settings of this store")

    def _lacks_credentials(self, text: str) -> str | None:
        """What went wrong where obstore did not ask the store, but for credentials; None where it did ask the store."""
        if (told := _NO_TOKEN.search(text)) is not None:
            return told[1]
        asked_at = _ASKED.search(text)
        if asked_at is None:
            return None
        method, url = asked_at["method"], asked_at["url"]
        # Several objects are deleted by a POST; others to an endpoint of the user's own are for credentials.
        is_of_objects = method in ("GET", "HEAD", "PUT", "DELETE") or url.endswith(("?delete", "&comp=batch"))
        of_store = (
            url == "REDACTED" or urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(self._endpoint).netloc
        )
        if is_of_objects and of_store and not asked_at["token"]:
            return None
        whom = urllib.parse.urlsplit(url)
        quoted, causes = _STATUS.search(text), _CAUSE.findall(text)
        reason = quoted[0] if quoted else causes[-1] if causes else "the connection failed or timed out"
        return f"{whom.scheme}://{whom.hostname}: {reason}" if whom.hostname else reason


# The process in which obstore's runtime was started, by its first request.
_runtime_pid: int | None = None


def _check_not_forked(root: str) -> None:
    global _runtime_pid
    if _runtime_pid is None:
        _runtime_pid = os.getpid()
    elif is_inherited(_runtime_pid):
        raise StoreError(
            f"{root}: this process was forked from one that had asked a store already, and its requests would hang; "
            'start it by "spawn" or "forkserver", or fork before the first request'
        )


def _lost(url: str, reason: str) -> WriteConflictError:
    return WriteConflictError(f"{url}: another has written it: {reason}")


def _open(root: str, options: StoreOptions, endpoint: str, hashes_uploads: bool | None = None) -> ObstoreStore:
    """`endpoint`: where it is, said or the provider's own. `hashes_uploads`: for uploads, with a hash or without."""
    kind = scheme(root)
    extra = dict(options.extra)
    _refuse_foreign(root, options, extra)
    client = {"timeout": "300s", "read_timeout": "30s", "connect_timeout": "10s"}
    client |= {name: value for name, value in extra.items() if name in settings.CLIENT}
    if hashes_uploads is not None:
        client |= {"timeout": f"{_UPLOAD_S}s", "read_timeout": f"{_UPLOAD_S}s"}
    client |= for_obstore(proxy_for(endpoint, extra), extra)
    clients: Any = {**client, "allow_http": True}
    retries: Any = {"max_retries": 0}
    apart = settings.CLIENT | settings.PROXIES | {"metadata_disabled"}
    config = {name: value for name, value in extra.items() if name not in apart}
    try:
        if kind in ("s3", "s3a"):
            config["unsigned_payload"] = str(hashes_uploads is False).lower()
            return _open_s3(root.partition("://")[2], options, config, clients, retries)
        if options.endpoint:
            config["google_base_url" if kind == "gs" else "azure_endpoint"] = options.endpoint
        if options.anonymous:
            config["skip_signature"] = "true"
        said: Any = config
        return from_url(root, config=said, client_options=clients, retry_config=retries)
    except (BaseError, ValueError, OSError) as error:
        if "No CA certificates" in str(error):
            raise ConfigError(
                f"cannot open {root}: this machine has no CA certificates; install ca-certificates or set SSL_CERT_FILE"
            ) from error
        raise ConfigError(f"cannot open {root}: {str(error).splitlines()[0]}; check storage_options") from showable(
            error
        )


def _refuse_foreign(root: str, options: StoreOptions, extra: dict[str, str]) -> None:
    """obstore takes what is not said from the variables of its process. The cache service has none of them; one that
    runs in a user's process may have those of another data set, or later ones.
    """
    has_keys = options.anonymous or options.access_key_id is not None
    names = settings.foreign(scheme(root), extra, os.environ, has_keys=has_keys)
    if names:
        raise ConfigError(
            f"cannot open {root}: {', '.join(names)} in the environment of this process would be used where the data "
            'set\'s own settings are others; unset it, or use a Cache without service="inprocess"'
        )


def _open_s3(bucket: str, options: StoreOptions, config: dict[str, str], clients: Any, retries: Any) -> S3Store:
    """Everything that a variable could say is said."""
    known: dict[str, Any] = {**config, "region": options.region or DEFAULT_REGION, "skip_signature": options.anonymous}
    if "sts_endpoint" in known:
        known["aws_endpoint_url_sts"] = known.pop("sts_endpoint")
    express = bucket.endswith(EXPRESS)
    virtual = as_bool(known.get("virtual_hosted_style_request")) or (express and not options.endpoint)
    origin, path = place(bucket, options, virtual)
    # Both names: the second one goes before the first.
    known["endpoint"] = known["aws_endpoint_url_s3"] = origin + path.removesuffix(f"/{bucket}")
    known["virtual_hosted_style_request"] = virtual
    known.setdefault("s3_express", express)
    known.setdefault("request_payer", False)
    if options.access_key_id is not None:
        # As a provider, so that no session token of this process's environment is added to the user's key.
        credential = {
            "access_key_id": options.access_key_id,
            "secret_access_key": options.secret_access_key,
            "token": options.session_token,
            "expires_at": None,
        }
        known["credential_provider"] = lambda: credential
    elif not settings.S3_WAYS & known.keys() and as_bool(dict(options.extra).get("metadata_disabled")):
        known["credential_provider"] = _no_credentials
    return S3Store(bucket, client_options=clients, retry_config=retries, **known)


def _no_credentials() -> Any:
    raise RuntimeError("AWS_EC2_METADATA_DISABLED forbids requests to the metadata server")


def endpoint_of(root: str, options: StoreOptions) -> str:
    """Where requests go: also the provider's own endpoint has a name."""
    kind, extra = scheme(root), dict(options.extra)
    if options.endpoint:
        return options.endpoint
    if kind in ("s3", "s3a"):
        return place(root.partition("://")[2], options, as_bool(extra.get("virtual_hosted_style_request")))[0]
    if kind == "gs":
        return extra.get("google_base_url", "https://storage.googleapis.com")
    account = re.search(r"@([^/]+)", root)  # abfss://container@account.dfs.core.windows.net
    host = account[1] if account else f"{extra.get('account_name', 'ACCOUNT')}.blob.core.windows.net"
    return extra.get("azure_endpoint", f"https://{host}")


def _reply(result: GetResult) -> Reply:
    """What obstore says of a reply to a ranged request: it takes none but 206."""
    (start, end), meta = result.range, result.meta
    return Reply(206, start, end, meta["size"], None, meta["e_tag"], _mtime_ns(meta))


def _mtime_ns(meta: ObjectMeta) -> int:
    return int(meta["last_modified"].timestamp()) * 10**9


_GOOGLE = {
    "google_bearer_token": "the token",
    "service_account_key": "the service account's key",
    "service_account": "the service account's file",
    "service_account_path": "the service account's file",
    "application_credentials": "the application default credentials",
}
# In the order in which the client library prefers them.
_AZURE = {
    "azure_storage_token": "the token",
    "account_key": "the account's key",
    "federated_token_file": "the workload's identity",
    "client_secret": "the client's secret",
    "sas_key": "the shared access signature",
    "use_azure_cli": "what the Azure CLI is logged in as",
}


def describe_credentials(kind: str, options: StoreOptions) -> str:
    """With what requests to a store of this scheme are signed: "the keys from AWS_ACCESS_KEY_ID"."""
    said, sources = dict(options.extra), dict(options.sources)

    def source(name: str) -> str:
        return sources.get(name, "storage_options")

    unsigned = ["google_skip_signature"] if kind == "gs" else ["azure_skip_signature"]
    if options.anonymous or any(as_bool(said.get(name)) for name in unsigned):
        return f"no signature, as {source('anonymous' if options.anonymous else unsigned[0])} says"
    if kind in ("s3", "s3a"):
        return _describe_s3_credentials(options, said, source("access_key_id"), sources)
    kinds = _GOOGLE if kind == "gs" else _AZURE
    found = next((name for name in kinds if name in said), None)
    if found is not None:
        return f"{kinds[found]} from {source(found)}"
    names = "GOOGLE_* nor gcloud's file" if kind == "gs" else "AZURE_*"
    return f"this machine's identity, since neither storage_options nor {names} names another"


def _describe_s3_credentials(options: StoreOptions, said: dict[str, str], source: str, sources: dict[str, str]) -> str:
    if options.access_key_id is not None:
        return f"the keys{' and the session token' if options.session_token else ''} from {source}"
    if {"role_arn", "web_identity_token_file"} <= said.keys():
        return f"the web identity of {sources.get('web_identity_token_file', 'storage_options')}"
    for name in ("container_credentials_relative_uri", "container_credentials_full_uri"):
        if name in said:
            return f"the container's role, from {sources.get(name, 'storage_options')}"
    profile = sources.get("profile", "a profile")
    return f"this machine's role, since no keys are in storage_options, AWS_ACCESS_KEY_ID or {profile}"
