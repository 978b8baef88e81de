"""What the figures of a benchmark mean, in sentences with the figure and the cure. Pure.

A loader's own limit is the least of what its parts give: the link, the decoders, and where data is cached the disk or
memory. A part counts as the limit where the loader reaches most of it; where it reaches none of them, that is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastload.timing.verdict import LATENCY_SHARE, THROTTLED_SHARE

# Of a part's own rate: above it, that part is what limits.
_REACHED = 0.85
# The same where the loader itself waits for fetches: beginning, and other work on the machine, take the rest.
_REACHED_FETCHING = 0.6
_FETCHING = ("fetch", "link", "latency", "throttled")
# An epoch that reads the data more often than this reads some of it again.
_READ_AGAIN = 1.1
# An epoch this short says little: start-up is most of it.
SHORT_S = 1.5


@dataclass(frozen=True, slots=True)
class Rate:
    """What an epoch gave in one state of the cache."""

    samples_per_s: float
    bytes_per_s: float
    seconds: float
    cpu_s: float = 0.0
    cores: float = 1.0
    fetched_bytes: int = 0
    bound_by: str = ""  # what the loader says of itself, in a word and in a sentence
    said: str = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """The least time a batch at which a consumer works 90 % of its time, or what a given time came to."""

    state: str
    step_s: float
    utilisation: float
    is_given: bool = False


@dataclass(frozen=True, slots=True)
class Beside:
    """Another loader's rates as a part of ours: in a first epoch, a later one from RAM, and one from the disk."""

    name: str
    first: float
    from_ram: float
    from_disk: float


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured; None for what was left out or failed."""

    samples: int
    byte_count: int  # of what was measured, unpacked, as the cache holds it
    stored_bytes: int  # of the same, as it comes over the link
    whole_bytes: int  # of all that the URLs name, unpacked
    batch_size: int
    workers: int
    shards: int
    store_bytes_per_s: float | None = None
    requests_at_bend: int | None = None
    first_byte_s: float | None = None
    request_bytes: float | None = None  # that the store was measured with
    retries: int = 0  # of that measurement, whatever made a request fail
    ranks: int = 1
    disk_bytes_per_s: float | None = None
    decode_per_s: float | None = None
    decode_name: str = ""
    cold: Rate | None = None
    refused: int = 0  # requests of the first epoch
    from_disk: Rate | None = None
    from_ram: Rate | None = None
    shares: tuple[tuple[float, Rate], ...] = ()
    predicted: tuple[float, float] | None = None  # the share from which more does not help, and samples a second
    demands: tuple[Demand, ...] = ()
    busy: float = 0.9  # the accelerator use that is enough
    profile: str = ""  # the workload of MLPerf Storage, of which each rank is an accelerator
    against: str = ""  # the user's loader, with its rates in a first and in later epochs
    yours: tuple[tuple[str, Rate, Rate | None], ...] = ()  # "first" or "later": its rate, and fastload's
    equality: str = ""
    ideal_per_s: float | None = None
    peers: tuple[Beside, ...] = ()
    load_before: float = 0.0
    cores: float = 1.0
    price_per_gb: float = 0.0
    price_per_1000: float = 0.0
    requests: int = 0
    epochs: int = 1


def sentences(found: Findings) -> list[str]:
    """The verdict, most important first. Never empty."""
    said = []
    if found.cold is not None:
        said.append(_first_epoch(found, found.cold))
    said += _later_epochs(found)
    said += [_demand(found, each) for each in found.demands]
    if found.profile:
        said.append(
            f"The profile {found.profile} has sizes, batch and step of DLIO's workload file for an H100; this is no "
            "result of MLPerf Storage, as the data is in tar and nothing trains."
        )
    said += _against(found)
    said += [_beside(each) for each in found.peers]
    said += _costs(found)
    if found.retries and not _is_throttled(found):
        said.append(
            f"While the store was measured, {_count(found.retries)} requests failed or were refused, and were tried "
            "again: its log, or that of what lies between, may say why."
        )
    if found.cold is not None and found.shards < found.workers * found.ranks:
        there = "There is only 1 shard" if found.shards == 1 else f"There are only {found.shards} shards"
        said.append(
            f"{there} for {found.workers * found.ranks} workers: with more of them, of 100 MB or so each, reading and "
            "shuffling go side by side."
        )
    if found.load_before > 0.5 * found.cores:
        said.append(
            f"The machine was busy (load {found.load_before:.1f} on {found.cores:g} cores): rates are lower than on a "
            "quiet one."
        )
    return said or ["Nothing was measured, so there is nothing to say."]


def limit_of(found: Findings, rate: Rate, source_bytes_per_s: float | None, source: str) -> tuple[str, float]:
    """What limits an epoch, and that part's own samples a second (where it has none, the epoch's).

    "start" where it is too short to say; `source` or "decode" where it reaches most of what that gives by itself; what
    the loader says of itself where that is known; then "cores" or "unknown". Of fetching, "throttled", "latency" and
    "link" are told apart by what the store gives by itself; below most of that it is "fetch".
    """
    linked_bytes = found.stored_bytes / max(1, found.samples)
    source_bytes = linked_bytes if source == "link" else found.byte_count / max(1, found.samples)
    parts = []
    if source_bytes_per_s:
        parts.append((source_bytes_per_s / source_bytes, source))
    if found.decode_per_s:
        parts.append((found.decode_per_s, "decode"))
    if rate.seconds < SHORT_S:
        return "start", rate.samples_per_s
    if parts:
        most, name = min(parts)
        if rate.samples_per_s >= _REACHED * most:
            return (_about_fetching(found) if name == "link" else name), most
    if rate.bound_by in _FETCHING:
        is_link = rate.samples_per_s * linked_bytes >= _REACHED_FETCHING * (found.store_bytes_per_s or math.inf)
        return _about_fetching(found, "" if is_link else rate.bound_by), rate.samples_per_s
    if rate.bound_by not in ("", "unknown"):
        return rate.bound_by, rate.samples_per_s
    if rate.cpu_s >= _REACHED * rate.seconds * rate.cores:
        return "cores", rate.samples_per_s
    return "unknown", rate.samples_per_s


def _about_fetching(found: Findings, bound_by: str = "") -> str:
    if _is_throttled(found) or bound_by == "throttled":
        return "throttled"
    if _latency_share(found) > LATENCY_SHARE:
        return "latency"
    # Where the loader reaches too little of what was measured, that cannot be the link; where nothing was, it says.
    return "fetch" if bound_by and found.store_bytes_per_s else bound_by or "link"


def _is_throttled(found: Findings) -> bool:
    return found.refused > 0 and found.refused >= THROTTLED_SHARE * max(found.requests, found.refused)


def _latency_share(found: Findings) -> float:
    """Of the time of a request, at as many at a time as give most: the part that passes before its first byte."""
    if not (found.store_bytes_per_s and found.request_bytes and found.requests_at_bend and found.first_byte_s):
        return 0.0
    whole_s = found.requests_at_bend * found.request_bytes / found.store_bytes_per_s
    return found.first_byte_s / max(whole_s, found.first_byte_s)


def _first_epoch(found: Findings, rate: Rate) -> str:
    head = f"A first epoch runs at {_rate(found, rate)}"
    limit, _ = limit_of(found, rate, found.store_bytes_per_s, "link")
    link = found.store_bytes_per_s or 0.0
    if limit == "throttled":
        return (
            f"{head}: throttling limits it (the store refused {_count(found.refused)} of {_count(found.requests)} "
            "requests); fewer nodes at a time, another prefix, or a cache that is warmed beforehand will help."
        )
    if limit == "latency":
        return (
            f"{head}: latency limits it (a request waits {_ms(found.first_byte_s or 0.0)} for its first byte, and "
            f"moves {_bytes(found.request_bytes or 0.0)}); larger shards, more requests at a time or a cache help."
        )
    if limit == "link":
        cure = "a cache lifts later epochs, a faster link or a nearer store this one"
        came = rate.bytes_per_s * found.stored_bytes / max(1, found.byte_count)
        beside = f" ({_mb(came)} of {_mb(max(link, came))})" if link else ""
        return f"{head}: the link limits it{beside}; {cure}."
    if limit == "decode" and found.decode_per_s:
        # Part by part, what was measured by itself may have been disturbed more than the epoch.
        decode_per_s = max(found.decode_per_s, rate.samples_per_s)
        return (
            f"{head}: decoding limits it ({_count(rate.samples_per_s)} of the {_count(decode_per_s)} samples/s that "
            f"{found.workers} threads decode by themselves); more bandwidth will not help, more cores or smaller "
            "stored images will."
        )
    if limit == "start":
        return f"{head}, but took only {rate.seconds:.1f} s: too short to say what limits it; raise --max-bytes."
    if limit == rate.bound_by != "unknown" and rate.said:
        return f"{head}. It is {rate.said}."
    if limit == "cores":
        busy = f"{rate.cpu_s / rate.seconds:.1f} of {rate.cores:g} are busy"
        return f"{head}: the cores limit it ({busy}); more or faster ones will help."
    rest = f"; the link alone gives {_mb(link)}" if link else ""
    return f"{head}: no single part limits it{rest}."


def _later_epochs(found: Findings) -> list[str]:
    said = []
    if found.from_ram is not None:
        said.append(
            f"Out of RAM an epoch runs at {_rate(found, found.from_ram)}{_because(found, found.from_ram, None, '')}."
        )
    if found.from_disk is not None:
        why = _because(found, found.from_disk, found.disk_bytes_per_s, "disk")
        said.append(f"From the cache's disk it runs at {_rate(found, found.from_disk)}{why}.")
        once = (
            found.from_disk.samples_per_s * found.byte_count / max(1, found.samples)
        )  # bytes a second, each read once
        times = found.from_disk.bytes_per_s / once if once else 1.0
        if times > _READ_AGAIN:
            said.append(
                f"It reads the data {times:.1f} times there: this phase's arena, small so that the disk is measured, "
                "holds fewer samples than the job has in hand at a time."
            )
    for share, rate in found.shares:
        fetched = rate.fetched_bytes / max(1, found.byte_count)
        said.append(
            f"With a disk cache of {share:.0%} of the data, {_bytes(share * found.whole_bytes)} here, later epochs run "
            f"at {_rate(found, rate)} and fetch {fetched:.0%} of the data again."
        )
    if found.predicted is not None:
        share, per_s = found.predicted
        size = f"a disk cache of {_bytes(share * found.whole_bytes)} here ({share:.0%} of the data)"
        said.append(
            f"By simulation {size} lifts later epochs to {_count(per_s)} samples/s, and a larger one does not help."
            if share
            else f"By simulation no disk cache lifts later epochs: without one they run at {_count(per_s)} samples/s."
        )
    return said


def _because(found: Findings, rate: Rate, source: float | None, name: str) -> str:
    limit, most = limit_of(found, rate, source, name)
    if limit == "decode" and found.decode_per_s:
        most = max(found.decode_per_s, rate.samples_per_s)
        return f", which is what decoding allows ({_count(most)} samples/s)"
    if limit == "disk" and source:
        return f", and the disk limits it ({_mb(rate.bytes_per_s)} of {_mb(max(source, rate.bytes_per_s))})"
    if limit == "cores":
        return ", which is what the cores allow"
    return f"; it is {rate.said}" if limit == rate.bound_by != "unknown" and rate.said else ""


def _demand(found: Findings, demand: Demand) -> str:
    per_s = found.batch_size / demand.step_s if demand.step_s else 0.0
    if demand.is_given:
        is_limit = demand.utilisation >= found.busy
        fate = "the consumer limits it, and the loader keeps up" if is_limit else "it waits for the rest"
        if found.profile:
            fate += f" ({found.busy:.0%} is asked for)"
        whom = f"{found.ranks} accelerators, each of which takes" if found.ranks > 1 else "an accelerator that takes"
        return (
            f"{demand.state}: {whom} {_step(demand.step_s)} a batch of {found.batch_size} would be used to "
            f"{demand.utilisation:.0%}; {fate}."
        )
    return (
        f"{demand.state}: an accelerator may take a batch of {found.batch_size} every {_step(demand.step_s)} "
        f"({_count(per_s)} samples/s) and is still busy {found.busy:.0%} of the time."
    )


def _against(found: Findings) -> list[str]:
    said = []
    for epoch, yours, ours in found.yours:
        beside = ""
        if ours is not None and ours.samples_per_s and yours.samples_per_s:
            times = ours.samples_per_s / yours.samples_per_s
            beside = f", fastload's at {_count(ours.samples_per_s)}: {times:.2g} times as fast"
        head = f"The first epoch of {found.against}" if epoch == "first" else "Its later epochs"
        said.append(f"{head} run{'s' * (epoch == 'first')} at {_count(yours.samples_per_s)} samples/s{beside}.")
    if found.equality:
        said.append(found.equality)
    if found.ideal_per_s:
        said.append(
            f"From memory, {'its' if found.against else 'such'} batches come at {_count(found.ideal_per_s)} samples/s, "
            "which no loader can beat."
        )
    return said


def _beside(peer: Beside) -> str:
    return (
        f"{peer.name} feeds {peer.first:.2f} times what fastload does in a first epoch, {peer.from_ram:.2f} times in a "
        f"later one from RAM, and {peer.from_disk:.2f} times in one from the disk."
    )


def _costs(found: Findings) -> list[str]:
    if not (found.price_per_gb or found.price_per_1000) or found.cold is None:
        return []
    scale = found.whole_bytes / max(1, found.byte_count)
    epoch = scale * (found.price_per_gb * found.stored_bytes / 1e9 + found.price_per_1000 * found.requests / 1e3)
    return [
        f"An epoch from the store costs {epoch:.2f}, {found.epochs} without a cache {found.epochs * epoch:.2f}, "
        f"with one that holds all of it {epoch:.2f}."
    ]


def _rate(found: Findings, rate: Rate) -> str:
    return f"{_count(rate.samples_per_s)} samples/s ({_mb(rate.bytes_per_s)})"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


def _step(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _mb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:,.0f} MB/s" if bytes_per_s >= 1e7 else f"{bytes_per_s / 1e6:.2g} MB/s"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
