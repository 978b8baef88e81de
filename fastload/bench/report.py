"""A result for people: lines for a terminal, and one HTML file that is readable offline and runs no script.

All text is escaped: URLs, names and notes come from buckets, stores and other programs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from statistics import median

from fastload.bench.compare import Change
from fastload.bench.peers import OURS
from fastload.bench.peers.race import PREFIX
from fastload.bench.schema import Figure, Phase, Result, Series
from fastload.config import format_bytes
from fastload.svgplot import COLOURS, Axis, Curve, line_plot

_TITLES = {
    "store": "The store by itself",
    "disk": "The cache's disk by itself",
    "memory": "Memory",
    "decode": "The decoders by themselves",
    "cold": "A first epoch, from the store",
    "ram": "An epoch from RAM",
    "disk epoch": "An epoch from the cache's disk",
    "yours": "Your loader, first epoch",
    "yours later": "Your loader, later epochs",
    "equality": "Whether both give the same samples",
    "ideal": "Batches replayed from memory",
    "prediction": "Later epochs as simulated",
    "demand": "How fast a consumer may be",
}
_SHARE = "share "


def title(phase: str) -> str:
    """What a phase is called."""
    if phase.startswith(_SHARE):
        return f"A later epoch, with a disk cache of {phase.removeprefix(_SHARE)} of the data"
    if phase.startswith(PREFIX):
        name = phase.removeprefix(PREFIX)
        return "fastload, in turns with other loaders" if name == OURS else f"Beside it: {name}"
    return _TITLES.get(phase, phase)


def number(value: float, unit: str) -> str:
    """A figure with its unit, to three digits or so."""
    if unit == "B/s":
        return f"{value / 1e6:,.0f} MB/s" if value >= 1e7 else f"{value / 1e6:.3g} MB/s"
    if unit == "B":
        return format_bytes(value)
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def shown(figure: Figure) -> str:
    """The median, and the range where there are several values."""
    middle = number(median(figure.values), figure.unit)
    if len(figure.values) < 2:
        return middle
    return f"{middle} ({number(min(figure.values), figure.unit)} to {number(max(figure.values), figure.unit)})"


def lines(result: Result) -> list[str]:
    """For a terminal or a pipe: the verdict, then the figures."""
    said = [*result.verdict, ""]
    if result.interrupted:
        said.insert(0, "Interrupted: this is what was measured until then.")
    for phase in result.phases:
        said.append(title(phase.name))
        if phase.error:
            said.append(f"  failed: {phase.error}")
        said += [f"  {figure.name:34} {shown(figure)}" for figure in phase.figures if _tells(figure)]
        said += [f"  {note}" for note in phase.notes]
    return said


def _tells(figure: Figure) -> bool:
    """A wait that was none is left out."""
    return bool(figure.values) and not (figure.name.startswith("waited for") and max(figure.values) < 0.005)


def change_lines(changes: Iterable[Change]) -> list[str]:
    """A comparison, a line for each figure."""
    found = []
    for each in changes:
        span = f" ({each.low:.3f} to {each.high:.3f})" if each.low != each.high else ""
        before, after = number(each.before, each.unit), number(each.after, each.unit)
        found.append(
            f"{each.phase + ': ' + each.name:48} {before:>14} {after:>14}   x{each.ratio:.3f}{span}  {each.word}"
        )
    return found


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 Helvetica, Arial, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
li { margin: .4rem 0; }
table { border-collapse: collapse; width: 100%; } td { border-top: 1px solid #8884; padding: .25rem .5rem .25rem 0; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } .note { opacity: .75; } .error { color: #c0392b; }
.wide { overflow-x: auto; }
"""


def html(result: Result) -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    work, machine = result.work, result.machine
    body = [
        f"<h1>How fast this data can be fed</h1><p>{_text(' '.join(work.urls))}</p>",
        "<p class='error'>Interrupted: this is what was measured until then.</p>" if result.interrupted else "",
        "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in result.verdict) + "</ul>",
        *(_section(phase) for phase in result.phases),
        "<h2>What was read, and where</h2>",
        _table(
            [
                ("shards read", f"{work.shards:,}"),
                ("samples", f"{work.samples:,}"),
                ("bytes", format_bytes(work.byte_count)),
                *((name, value) for name, value in work.options.items() if value),
                ("processor", f"{machine.cpu}, {machine.cores:g} cores"),
                ("memory", format_bytes(machine.memory_bytes)),
                ("kernel, file system", f"{machine.kernel}, {machine.file_system}"),
                ("load before and after", f"{machine.load_before:.1f}, {machine.load_after:.1f}"),
                *result.versions.items(),
                ("taken at", result.taken_at),
                ("command", " ".join(result.command)),
            ]
        ),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width'><title>fastload bench</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _section(phase: Phase) -> str:
    parts = [f"<h2>{_text(title(phase.name))}</h2>"]
    if phase.error:
        parts.append(f"<p class='error'>failed: {_text(phase.error)}</p>")
    parts.append(_table([(figure.name, shown(figure)) for figure in phase.figures if _tells(figure)]))
    parts += [_plot(series) for series in phase.series if len(series.xs) > 1]
    parts += [f"<p class='note'>{_text(note)}</p>" for note in phase.notes]
    return "".join(parts)


def _plot(series: Series) -> str:
    scale, unit = (1e-6, "MB/s") if series.y_unit == "B/s" else (1.0, series.y_unit)
    end = 1.0 if series.y_unit == "share" else 0.0
    curve = Curve(series.name, COLOURS[0], series.ys)
    plot = line_plot(series.name, "", series.xs, [curve], Axis(series.x_unit), Axis(unit, end, scale))
    return f"<div class='wide'>{plot}</div>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<div class='wide'><table>{cells}</table></div>" if rows else ""


def _text(text: str) -> str:
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
