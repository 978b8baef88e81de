"""Hand a job over to the daemon of a cache directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastload.client.operator import Operator
from fastload.daemon.config import absolute, data_table


def submit(directory: Path, job: Mapping[str, Any]) -> str:
    """Have the daemon of `directory` warm what `job` says, a `[[data]]` table as a mapping.

    Returns the job's id once the daemon has stored it. One that is submitted again is the same job, and runs again
    where it is over; another one of its name takes its place.

    Variables and relative paths in it are this process's. ConfigError for a job that cannot be, NotServedError or
    ServiceError where no daemon serves.
    """
    table = absolute(data_table(job, os.environ))
    with Operator.connect(directory, "submit") as operator:
        return operator.submit(msgspec.to_builtins(table))
