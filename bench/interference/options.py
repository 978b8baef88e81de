"""What is asked for, and the processes that measure it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """Which kinds of data, by how many threads; the data sets are kept in `folder`. `where`: also which lines let go of
    the GIL; `first`: real-time priority for what wakes up.
    """

    cases: Sequence[str]
    threads: Sequence[int]
    folder: Path
    where: bool = False
    first: bool = False

    def process(self, environment: Mapping[str, str], *arguments: str) -> Any:
        """What a measured process prints."""
        command = [sys.executable, "-m", "bench.interference", "--folder", str(self.folder)]
        command += ["--where"] * self.where + ["--first"] * self.first + ["--run", *arguments]
        environment = {**environment, "FASTLOAD_IDLE_S": "0"}
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
