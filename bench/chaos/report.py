"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.chaos.schedule import FAULTS, LIES


def as_text(report: Mapping[str, Any]) -> str:
    """The report in words: what was read, what was done, and what should not have happened."""
    epochs = ", ".join(f"{kind} {count}" for kind, count in report["epochs"].items())
    known = {**FAULTS, **LIES}
    lines = [
        f"seed {report['seed']}, {report['seconds']:.0f} s: {report['samples']} samples in {report['steps']} steps "
        f"(epochs: {epochs}), {report['resumes']} resumes, {report['requests']} answers of the store",
        "",
        "| what was done | times |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(report["events"].items())),
        f"| system calls that failed with that | {report['failed_calls']} |",
        *(f"| resized from {sizes} | {count} |" for sizes, count in sorted(report["resizes"].items())),
        "",
        "| the store | times |",
        "|---|---|",
        *(f"| {words} | {report['faults'][kind]} |" for kind, words in known.items() if kind in report["faults"]),
        "",
    ]
    if report["without"]:
        lines += [f"left out: {', '.join(report['without'])}", ""]
    if not report["defects"] and any(kind in report["faults"] for kind in LIES):
        return "\n".join(
            [*lines, "nothing lost, doubled, out of order, hung or left behind, although the store gave wrong answers"]
        )
    if not report["defects"]:
        return "\n".join([*lines, "nothing lost, doubled, out of order, damaged, hung or left behind"])
    lines += [f"{len(report['defects'])} DEFECTS", *report["defects"], "", "the schedule up to there:"]
    return "\n".join([*lines, *report["schedule"]])
