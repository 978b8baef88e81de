"""What the loader costs the thread that trains: how often our threads take the GIL, and how late that thread wakes up.

    python -m bench.interference                      # fifteen minutes; status 1 where a target is missed
    python -m bench.interference --case records       # one kind of data
    python -m bench.interference --where              # also which lines let go of the GIL, and what they did before

Taking the GIL is counted exactly, by a library that is loaded before libc (`gil.c`); without a C compiler that part is
left out. The figures are medians over runs of batches in an epoch, and means over it, in which what is done once for a
window or shard is spread over all batches. Each kind of data is read twice: as it comes from the cache service, which
has to fetch it, and again from the service's memory. `work` is processor time, in the longest stretch for which a
thread of fastload kept the GIL.

Wake-up gaps are those of a Python thread that sleeps half a millisecond again and again, and of one that computes in
steps of a tenth of that, while another takes batches: as fast as they come, where decoding them is what takes time;
else as fast as eight GPUs train on them, and once more as fast as they come, which has no target, since all threads
then run Python hundreds of times a second. Idle and loaded spells alternate within a process. `later` is the median
over rounds of how much later than idle one wake-up in a thousand comes, and `GIL` how long it waits for the GIL alone:
what else the machine does is in `later`, unless `--first` gives our processes real-time priority, and the thread that
wakes up the highest. For comparison: a thread that hashes, which needs a core and hardly the GIL, and one that decodes
with Pillow, image by image, as loaders do whose threads run Python for each sample.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench import data, gil
from bench.interference import counts, gaps, report
from bench.interference.cases import CASES, prepare
from bench.interference.options import Options


def main() -> int:
    """Measure what the arguments ask for."""
    arguments = _arguments()
    options = Options(arguments.case, arguments.threads, arguments.folder, arguments.where, arguments.first)
    if arguments.run:
        print(json.dumps(_run(options, *arguments.run)))
        return 0
    prepare(options.folder)
    print(f"{os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        environment = gil.environment(Path(folder))
        met = [report.counts_met(options, environment), report.gaps_met(options, environment or os.environ)]
    return int(not all(met))


def _run(options: Options, kind: str, name: str, threads: str, how: str = "", per_s: str = "inf") -> dict[str, object]:
    """What a measured process does."""
    if kind == "count":
        return {source: asdict(found) for source, found in counts.run(options, name, int(threads)).items()}
    return asdict(gaps.run(options, name, int(threads), how, float(per_s)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.interference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--where", action="store_true", help="show where the GIL is let go (CPython 3.11)")
    parser.add_argument("--first", action="store_true", help="real-time priority for what wakes up (needs root)")
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="where the data sets are kept")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # of a measured process
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
