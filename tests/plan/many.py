"""The plan's properties on many random cases: `python -m tests.plan.many --cases 10000`, a few minutes.

The same tests as in every run of all tests, each with as many times more cases as it takes for so many in all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.plan import cases

MODULES = ("test_cursor", "test_global", "test_partitions", "test_mixture")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="random cases in all")
    parser.add_argument("--seed", type=int, default=None, help="of hypothesis; another each time by default")
    options = parser.parse_args()
    for module in MODULES:
        __import__(f"tests.plan.{module}")
    scale = options.cases / sum(cases.counts)
    seed = [] if options.seed is None else [f"--hypothesis-seed={options.seed}"]
    print(f"{len(cases.counts)} properties, {scale:.2f} times the cases of each")
    return subprocess.call(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--timeout=3600",
            "--hypothesis-profile=default",
            *seed,
            *(f"tests/plan/{name}.py" for name in MODULES),
        ],
        env=os.environ | {cases.SCALE_VARIABLE: str(scale)},
    )


if __name__ == "__main__":
    sys.exit(main())
