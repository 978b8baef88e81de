"""Scripts under torchrun, as users start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Launched:
    """`torchrun *arguments`, run in the root of the repository or a folder; ended, if it has not, with the block."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path = ROOT
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def output(self, timeout_s: float = PATIENCE_S) -> str:
        """What it printed, once it has ended well. AssertionError, with what it printed, otherwise."""
        try:
            output, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun did not end in {timeout_s:g} s:\n{self.end()}") from None
        assert self._process.returncode == 0, output
        return output

    def read_until(self, words: str) -> str:
        """What it prints up to a line with these words. AssertionError where it ends before."""
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if words in line:
                return "".join(lines)
        raise AssertionError("".join(lines))

    def end(self) -> str:
        """End the launcher by SIGTERM, and with it its ranks; what was printed and not read. May be called twice."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return ""
        self._process.terminate()
        with self._process.stdout:
            output = self._process.stdout.read()  # not by `communicate`, which loses what `read_until` has buffered
        self._process.wait(PATIENCE_S)
        return output
