"""What `fastload doctor` looks at. Each check is a function that says what it found, and the cure where that is bad.

They start no service, make no directory and leave no file. Of credentials they show only where these come from.
"""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import http.client
import importlib.metadata
import mmap
import os
import platform
import re
import resource
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastload.cache import limits
from fastload.cgroups import memory_limits, read_file
from fastload.config import CacheLimits, default_disk_bytes, default_ram_bytes, format_bytes, memory_limit_bytes
from fastload.errors import FastloadError, ObjectMissingError
from fastload.redaction import redact
from fastload.version import __version__

if TYPE_CHECKING:
    from fastload.store.options import StoreOptions
    from fastload.store.types import Store

State = Literal["ok", "warn", "fail"]

_DISK_PROBE_BYTES = 128 << 20
_DISK_BLOCK_BYTES = 4 << 20
_DISK_S = 1.0  # of writing, and of reading
_DISK_SLOW_BYTES_PER_S = 200e6
_READ_BYTES = 8 << 20
_LISTED_MAX = 1000  # of a prefix, to find a shard among what lies beside it
_STORE_S = 5.0  # how long a store that fails is asked again
_REPLY_S = 10.0
_LATENCY_S = 1.0
_SKEW_S, _SKEW_REFUSED_S = 30.0, 300.0  # S3 refuses requests that are 15 minutes off, others 5
_DESCRIPTORS = 4096
_LOG_BYTES = 256 << 10
# What several machines share: a cache's files and locks belong on a disk of the node.
_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "ceph",
    "beegfs",
    "gpfs",
    "glusterfs",
    "9p",
    "fuse.s3",
    "fuse.juicefs",
)


class Check(NamedTuple):
    """What one check found."""

    name: str
    state: State
    says: str
    cure: str = ""
    url: str = ""  # where it is about one


def of_node(directory: Path) -> Iterator[Check]:
    """The machine, what is installed, and the cache's directory."""
    settled, found = _limits(directory)
    yield from versions()
    yield from _kernels()
    yield descriptors()
    yield memory(settled)
    if found is not None:
        yield found
    else:
        try:
            yield from _disk(directory, settled)
        except OSError as error:
            yield Check("disk", "fail", f"{directory}: {_said(error)}", "name another directory: --cache DIR")
    yield from _service(directory)


def of_store(url: str, profile: str | None = None) -> Iterator[Check]:
    """One URL, as a job would read it: credentials, clock, and the first bytes of its first object."""
    from fastload.store.listing import expand
    from fastload.store.logins import apart
    from fastload.store.opening import RequestOptions, open_store
    from fastload.store.options import StoreOptions
    from fastload.store.urls import store_root
    from fastload.store.wrappers import RetryOptions

    try:
        urls, login = apart([url], {"profile": profile} if profile else None)
        options, first = StoreOptions.from_environment(login), expand(urls[0])[0]
        root = store_root(first)
        yield from _credentials(root, options)
        yield from _clock(root, options)
        store = open_store(first, options, RequestOptions(retry=RetryOptions(deadline_s=_STORE_S)))
        with contextlib.closing(store):
            yield from _reading(store, first)
    except FastloadError as error:
        yield Check("store", "fail", str(error))


def _limits(directory: Path) -> tuple[CacheLimits, Check | None]:
    """Those of the cache, or what a first job would give it; and why its directory cannot be looked at."""
    new = CacheLimits(default_ram_bytes(), max(0, default_disk_bytes(directory)))
    try:
        if not directory.exists():
            return new, Check("directory", "ok", f"{directory} is not there yet: the first job makes it")
        if not directory.is_dir():
            return new, Check("directory", "fail", f"{directory} is no directory", "name one: --cache DIR")
        return limits.stored(directory) or new, None
    except (FastloadError, OSError) as error:
        return new, Check("directory", "fail", _said(error), "name another one: --cache DIR, or FASTLOAD_CACHE")


def versions() -> Iterator[Check]:
    """Of fastload and the system, and of each package that it needs."""
    yield Check(
        "versions",
        "ok",
        f"fastload {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}",
    )
    try:
        required = importlib.metadata.requires("fastload") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "warn", "fastload runs from a folder and is not installed", "pip install it")
        return
    wanted = {match[1]: match[2] or "" for each in required if (match := _REQUIRED.match(each)) and ";" not in each}
    found = {name: _version(name) for name in wanted}
    bad = [f"{name}>={least}" if least else name for name, least in wanted.items() if not _is_met(found[name], least)]
    said = ", ".join(f"{name} {version or '(none)'}" for name, version in found.items())
    if bad:
        yield Check("packages", "fail", said, f"pip install {' '.join(repr(each) for each in bad)}")
    else:
        yield Check("packages", "ok", said)


_REQUIRED = re.compile(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_met(version: str, least: str) -> bool:
    """Whether it is installed, and not older, as far as the first three numbers say."""
    first, wanted = ([int(each) for each in re.findall(r"\d+", text)[:3]] for text in (version, least))
    return bool(version) and first >= wanted


def _kernels() -> Iterator[Check]:
    from fastload.cli.compile import kernel_status

    status = kernel_status()
    if status.why_plain is not None:
        says = f"each user's first job compiles them, since {status.why_plain}"
        yield Check("kernels", "warn", says, "install a version that was")
    elif status.missing_count:
        says = f"{status.missing_count} of {status.module_count} modules are not compiled: {status.why_missing}"
        yield Check("kernels", "warn", says, "run `fastload compile`, or the first job does")
    else:
        yield Check("kernels", "ok", f"{status.module_count} modules are compiled for {status.level}")
    if status.c_unit is not None:
        yield Check("C unit", "ok", status.c_unit)
    else:
        reason, _, cure = status.why_no_c_unit.partition(". ")
        yield Check("C unit", "warn", f"none, {reason}: images are decoded by simplejpeg, which is slower", cure)


def descriptors() -> Check:
    """How many files and sockets a process may open: a service has one for each request."""
    from fastload.service.fetching.request_limit import requests_max

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{soft} may be open in a process: up to {requests_max()} requests at a time"
    if soft >= _DESCRIPTORS:
        return Check("descriptors", "ok", says)
    return Check("descriptors", "warn", says, f"run `ulimit -n {min(hard, 65536) if hard > 0 else 65536}` before jobs")


def memory(settled: CacheLimits) -> Check:
    """The arena counts for the control group of those that fill it: beyond the limit the kernel kills a process."""
    limit, ram = memory_limit_bytes(), settled.ram_bytes
    groups = [each for each in memory_limits(read_file) if each.limit_bytes == limit]
    used = f", {format_bytes(groups[0].used_bytes)} of that in use" if groups else ""
    says = f"ram_bytes is {format_bytes(ram)}; this process may use {format_bytes(limit)}{used}"
    cure = f"lower ram_bytes, to {format_bytes(limit // 4)} for example, or raise the limit of the control group"
    if ram > limit:
        return Check("memory", "fail", says, cure)
    return Check("memory", "warn", says, cure) if ram > limit // 2 else Check("memory", "ok", says)


def _disk(directory: Path, settled: CacheLimits) -> Iterator[Check]:
    status = os.statvfs(directory)
    free, wanted = status.f_bavail * status.f_frsize, settled.disk_bytes
    held = _held_bytes(directory)
    says = f"{format_bytes(free)} free at {directory}, disk_bytes is {format_bytes(wanted)}"
    if held:
        says += f", of which {format_bytes(held)} are used"
    if wanted and free + held < wanted:
        yield Check("room", "warn", says, f"lower disk_bytes to {format_bytes(free + held)}, or make room")
    else:
        yield Check("room", "ok", says)
    kind = _file_system(directory)
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        yield Check("file system", "fail", f"{directory} is on {kind}", "name a directory on a local disk: --cache DIR")
    elif kind == "tmpfs":
        yield Check("file system", "warn", f"{directory} is on tmpfs: the disk tier takes memory", "name a local disk")
    else:
        yield Check("file system", "ok", kind or "not known")
    try:
        yield _disk_rate(directory, free)
    except OSError as error:
        yield Check(
            "disk rate", "fail", f"{directory}: {error.strerror or error}", "name a disk that can be written to"
        )


def _held_bytes(directory: Path) -> int:
    """What the disk tier takes up already."""
    held = 0
    for folder, _, names in os.walk(directory / "chunks"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                held += os.stat(os.path.join(folder, name)).st_blocks * 512
    return held


def _file_system(directory: Path) -> str:
    """The kind of the mount that the directory is on, "" where that is not to be had."""
    found = (0, "")
    path = os.path.realpath(directory)
    for line in read_file("/proc/self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        place = fields.split(" ")[4] if fields.count(" ") >= 4 else ""
        is_above = place and (path == place or path.startswith(place.rstrip("/") + "/"))
        if is_above and len(place) >= found[0]:
            found = (len(place), kind.split(" ")[0])
    return found[1]


def _disk_rate(directory: Path, free: int) -> Check:
    """Write and read without the page cache for a second each, in a file without a name, which is gone when it is
    closed, and that way also when this process is killed.
    """
    size = min(_DISK_PROBE_BYTES, free // 100) // _DISK_BLOCK_BYTES * _DISK_BLOCK_BYTES
    if size < _DISK_BLOCK_BYTES:
        return Check("disk rate", "warn", "not measured: the disk is full", "make room")
    try:
        fd, how = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT, 0o600), "directly"
    except OSError:  # no direct I/O on this file system, or no files without names
        try:
            fd, how = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "through the page cache"
        except OSError as error:
            return Check("disk rate", "warn", f"not measured: {error.strerror}", "see whether the disk is writable")
    try:
        with mmap.mmap(-1, _DISK_BLOCK_BYTES) as block:  # aligned to pages, as direct I/O wants it
            block.write(os.urandom(_DISK_BLOCK_BYTES))
            written, write_s = _timed(lambda at: os.pwritev(fd, [block], at), size, lambda: os.fsync(fd))
            read, read_s = _timed(lambda at: os.preadv(fd, [block], at), written)
    finally:
        os.close(fd)
    rates = written / write_s, read / read_s
    says = f"{format_bytes(rates[0])}/s written, {format_bytes(rates[1])}/s read, {how}, {format_bytes(written)}"
    if how == "directly" and min(rates) < _DISK_SLOW_BYTES_PER_S:
        return Check("disk rate", "warn", says, "a local NVMe gives ten times as much; name one: --cache DIR")
    return Check("disk rate", "ok", says)


def _timed(block: Callable[[int], int], size: int, end: Callable[[], object] = lambda: None) -> tuple[int, float]:
    """Bytes and seconds of so much work, or of as much as a second allows."""
    began, done = time.perf_counter(), 0
    while done < size and time.perf_counter() - began < _DISK_S:
        done += block(done)
    end()
    return done, max(1e-6, time.perf_counter() - began)


def _service(directory: Path) -> Iterator[Check]:
    from fastload.client.operator import NotServedError, Operator

    try:
        with Operator.connect(directory, "doctor") as operator:
            began = time.perf_counter()
            snapshot = operator.snapshot()
            took = time.perf_counter() - began
        kind = "a daemon" if snapshot.node.is_daemon else "a service on demand"
        says = f"{kind} runs, process {snapshot.node.pid}, and answers in {took * 1000:.0f} ms"
        yield Check("service", "ok", says)
        for trouble in snapshot.troubles:
            yield Check("trouble", "warn", trouble)
    except NotServedError:
        yield Check("service", "ok", "none runs now; jobs start one")
    except (FastloadError, OSError) as error:
        yield Check("service", "fail", _said(error), "end that process, or name another directory: --cache DIR")
    yield from _log(directory / "service.log")


def _log(path: Path) -> Iterator[Check]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        yield Check("log", "warn", f"{path}: {error.strerror}", f"mend its rights: chmod 600 {path}")
        return
    bad = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line[:100])]
    if bad:
        yield Check("log", "warn", f"{len(bad)} warnings and errors lately, the last: {bad[-1][:300]}", f"read {path}")
    else:
        yield Check("log", "ok", f"{path} has no warnings")


def _credentials(root: str, options: StoreOptions) -> Iterator[Check]:
    from fastload.store.objectstore import describe_credentials
    from fastload.store.urls import BUCKETS, scheme

    kind = scheme(root)
    if kind in BUCKETS or kind in ("abfs", "abfss", "adl", "azure"):
        yield Check("credentials", "ok", f"{root}: {describe_credentials(kind, options.of_scheme(kind))}")


def _clock(root: str, options: StoreOptions) -> Iterator[Check]:
    """A store refuses requests whose time of signing is not now. Every reply of a web server says what time it is."""
    from fastload.store.objectstore import endpoint_of
    from fastload.store.urls import BUCKETS, scheme

    kind = scheme(root)
    if kind not in (*BUCKETS, "http", "https"):
        return
    address = root if kind in ("http", "https") else endpoint_of(root, options.of_scheme(kind))
    began = time.time()
    try:
        headers = _headers(address, dict(options.of_scheme(kind).extra))
    except (OSError, ValueError, http.client.HTTPException) as error:
        says = f"{address} does not answer as a web server does: {getattr(error, 'reason', '') or repr(error)}"
        yield Check("endpoint", "fail", says, "check its address, the network, proxies and certificates")
        return
    took = time.time() - began
    yield Check("endpoint", "ok", f"{address} answers in {took * 1000:.0f} ms")
    with contextlib.suppress(ValueError):  # no time, or what is none
        skew = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp() + 0.5 - (began + took / 2)
        says = f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store's"
        state: State = "ok" if abs(skew) < _SKEW_S else "warn" if abs(skew) < _SKEW_REFUSED_S else "fail"
        yield Check(
            "clock", state, says, "" if state == "ok" else "set it: chronyc makestep, or timedatectl set-ntp true"
        )


def _headers(address: str, settings: Mapping[str, str]) -> email.message.Message:
    """Of the reply to a request for nothing in particular, also of one that refuses it; with the proxy and the
    certificates that a job would use.
    """
    from fastload.store.httpclient import tls_context
    from fastload.store.proxies import proxy_for

    proxy = proxy_for(address, settings)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({} if proxy is None else dict.fromkeys(("http", "https"), proxy.url)),
        urllib.request.HTTPSHandler(context=tls_context(settings.get("root_certificate"))),
    )
    try:
        with opener.open(urllib.request.Request(address, method="HEAD"), timeout=_REPLY_S) as reply:
            headers: email.message.Message = reply.headers
            return headers
    except urllib.error.HTTPError as error:
        with error:
            return error.headers


def _reading(store: Store, url: str) -> Iterator[Check]:
    """The first object, of a prefix the first shard: that it is there, and what its first bytes take."""
    from fastload.formats import SHARD_ENDINGS
    from fastload.store.listing import ends_in

    began = time.perf_counter()
    if url.endswith("/"):
        listed = list(islice(store.list(url), _LISTED_MAX))
        info = next((each for each in listed if ends_in(each.url.lower(), SHARD_ENDINGS)), next(iter(listed), None))
        if info is None:
            raise ObjectMissingError(f"{url}: there is nothing under this prefix; list the bucket to see what there is")
    else:
        info = store.head(url)
    latency = time.perf_counter() - began
    yield Check("object", "ok", f"{info.url}, {format_bytes(info.size)}, found in {latency * 1000:.0f} ms")
    if not info.size:
        return
    began = time.perf_counter()
    store.read_into(info, 0, memoryview(bytearray(1)))
    first = time.perf_counter() - began
    whole = memoryview(bytearray(min(info.size, _READ_BYTES)))
    began = time.perf_counter()
    store.read_into(info, 0, whole)
    took = max(1e-6, time.perf_counter() - began)
    rate = f"{format_bytes(len(whole) / took)}/s over one connection"
    says = f"one byte in {first * 1000:.0f} ms, {format_bytes(len(whole))} in {took * 1000:.0f} ms ({rate})"
    if first > _LATENCY_S:
        yield Check("read", "warn", says, "use an endpoint that is nearer, or see whether a proxy is in between")
    else:
        yield Check("read", "ok", says)


def _said(error: BaseException) -> str:
    return (
        str(error.strerror or error)
        if isinstance(error, OSError) and not isinstance(error, FastloadError)
        else str(error)
    )


def shown(check: Check) -> Check:
    """Without what looks like a secret."""
    return check._replace(says=redact(check.says), cure=redact(check.cure), url=redact(check.url))
