"""What was found, as tables with their targets: how often the GIL is taken, and how late a thread wakes up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product

from bench.interference.cases import CASES, Case
from bench.interference.counts import ROLES, SERVED, WARM, Counts
from bench.interference.gaps import QUANTILES, Gaps
from bench.interference.loads import PEERS
from bench.interference.options import Options

TAKEN_MAX = 20
LATER_MS_MAX = 1.0
RUN = 8  # batches that are counted together: threads work ahead, so one batch's share falls on another now and then


def counts_met(options: Options, environment: Mapping[str, str] | None) -> bool:
    """Print a table of how often each kind of thread takes the GIL; whether all targets are met."""
    if environment is None:
        print("\nno C compiler (`cc`): how often the GIL is taken is not counted")
        return True
    print(f"\nhow often the GIL is taken a batch, median [mean]; by our threads at most {TAKEN_MAX} times\n")
    heads = " ".join(f"{role:>7}" for role in ROLES)
    print(f"{'':42} {'threads':7} {heads} {'ours':>15} {'work, ms':>9}")
    met = True
    for name in options.cases:
        case = CASES[name]
        for threads in options.threads:
            found = options.process({**environment, **case.environment}, "count", name, str(threads))
            for source in (SERVED, WARM):
                met &= _print_counts(case, source, threads, Counts(**found[source]))
    return met


def _print_counts(case: Case, source: str, threads: int, found: Counts) -> bool:
    by_role = {role: [each.get(role, 0) for each in found.batches] for role in ROLES}
    middles = [statistics.median(runs(counts)) for counts in by_role.values()]
    ours = [sum(of_batch) for of_batch in zip(*(by_role[role] for role in ROLES if role != "trainer"), strict=True)]
    middle = statistics.median(runs(ours))
    is_met = middle <= TAKEN_MAX
    print(
        f"{case.what if source == SERVED else '':42} {threads:7} "
        + " ".join(f"{each:7.1f}" for each in middles)
        + f" {middle:7.1f} [{statistics.mean(ours):5.1f}] {found.work_ms:9.2f}"
        + f"  {_verdict(is_met=is_met, has_target=case.has_target):6} {source}"
    )
    for line in found.places:
        print(f"    {line}")
    return is_met or not case.has_target


def runs(counts: Sequence[int]) -> list[float]:
    """Means of batches that follow one another."""
    return [statistics.mean(counts[at : at + RUN]) for at in range(len(counts) - RUN + 1)]


def gaps_met(options: Options, environment: Mapping[str, str]) -> bool:
    """Print tables of wake-up gaps; whether all targets are met."""
    met = True
    for how in ("sleeps", "computes"):
        print(
            f"\ngaps between the wake-ups of a thread that {how}, ms; with one decode thread at most {LATER_MS_MAX:g} "
            "later than idle\n"
        )
        heads = "  ".join(f"{f'{which} p{100 * q:g}':>12}" for which in ("idle", "loaded") for q in QUANTILES)
        print(f"{'':42} {'threads':7} {'batch/s':>8} {heads} {'later':>7} {'GIL p99.9':>10}")
        for name in options.cases:
            for threads, per_s in product(options.threads, paces(CASES[name])):
                environ = {**environment, **CASES[name].environment}
                found = options.process(environ, "gaps", name, str(threads), how, str(per_s))
                has_target = CASES[name].has_target and threads == 1 and per_s == paces(CASES[name])[0]
                met &= _print_gaps(CASES[name].what, threads, Gaps(**found), has_target=has_target)
        for name, what in PEERS.items():
            _print_gaps(what, 1, Gaps(**options.process(environment, "gaps", name, "1", how)), has_target=False)
    return met


def paces(case: Case) -> list[float]:
    """How often a second batches are taken at most; the target is for the first."""
    return [math.inf] if case.trained_per_s is None else [case.trained_per_s, math.inf]


def _print_gaps(what: str, threads: int, found: Gaps, *, has_target: bool) -> bool:
    is_met = found.later_ms <= LATER_MS_MAX
    cells = "  ".join(f"{gap:12.2f}" for gap in (*found.idle_ms, *found.loaded_ms))
    waits = "" if found.gil_ms is None else f"{found.gil_ms:10.2f}"
    print(
        f"{what:42} {threads:7} {found.per_s:8.1f} {cells} {found.later_ms:7.2f} {waits}"
        f"  {_verdict(is_met=is_met, has_target=has_target)}"
    )
    return is_met or not has_target


def _verdict(*, is_met: bool, has_target: bool) -> str:
    return "" if not has_target else "met" if is_met else "missed"
