"""A snapshot as metrics: one custom collector, which keeps nothing from one scrape to the next.

Labels are `data_set`, `tier`, `cause`, `rank` and `endpoint`, and no label is a URL or a key. Their values are bounded
in length and number, whatever consumers and buckets are called: what is beyond a bound is summed under `(other)`, and
all together are never more than `SERIES_MAX` series. docs/operations.md lists every metric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from fastload.errors import FastloadError
from fastload.snapshot import Consumer, DataSet, Endpoint, Histogram, Job, Snapshot
from fastload.timing.activity import CAUSES
from fastload.timing.histogram import BOUNDS_S

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Item = TypeVar("Item")

SERIES_MAX = 1000
OTHER = "(other)"
UNNAMED = "(unnamed)"  # data of which only a folder of a store is known
NO_RANK = "none"

_LABEL_CHARACTERS_MAX = 100
_DATA_SETS_MAX = 20
_JOBS_MAX = 15
_ENDPOINTS_MAX = 3
_RANK_MAX = 1_000_000
_SERIES_OF_RANK_MAX = 3 + 4 + len(CAUSES) + len(BOUNDS_S) + 3


class Counted(NamedTuple):
    """How a counter of the service (docs/protocol.md) is shown."""

    metric: str  # without "fastload_"; with "_total" it is a counter, else a gauge
    says: str


COUNTERS = {
    "fetched_bytes": Counted("fetched_bytes_total", "Bytes fetched from stores, in whole chunks."),
    "fetched_chunks": Counted("fetched_chunks_total", "Chunks fetched from stores."),
    "failed_fetches": Counted("failed_fetches_total", "Chunks that could not be fetched."),
    "disk_read_bytes": Counted("disk_read_bytes_total", "Bytes read from the disk tier."),
    "disk_read_chunks": Counted("disk_read_chunks_total", "Chunks read from the disk tier."),
    "written_bytes": Counted("disk_written_bytes_total", "Bytes written to the disk tier."),
    "written_chunks": Counted("disk_written_chunks_total", "Chunks written to the disk tier."),
    "writes_refused": Counted("disk_writes_refused_total", "Chunks not written: no room, or a failed disk."),
    "writes_skipped": Counted("disk_writes_skipped_total", "Writes dropped before they began: the disk was slow."),
    "writes_over_budget": Counted("disk_writes_over_budget_total", "Writes dropped for disk_write_bytes_per_s."),
    "writes_given_up": Counted("disk_writes_given_up_total", "Writes given up before they began."),
    "writes_hung": Counted("disk_writes_hung_total", "Writes given up under way: the disk hung."),
    "disk_reads_hung": Counted("disk_reads_hung_total", "Reads given up under way: the disk hung."),
    "disk_damaged": Counted("disk_damaged_chunks_total", "Chunks of the disk tier that were damaged, and dropped."),
    "disk_errors": Counted("disk_errors_total", "Errors of the disk tier."),
    "disk_stalls": Counted("disk_stalls_total", "Times that the disk did not answer and was bypassed."),
    "evicted": Counted("evicted_chunks_total", "Chunks removed from the disk tier for others."),
    "dropped_chunks": Counted("dropped_chunks_total", "Chunks dropped from RAM."),
    "dropped_unwritten": Counted("dropped_unwritten_chunks_total", "Of those, chunks that the disk tier did not hold."),
    "recalls": Counted("recalls_total", "Leases that were asked back."),
    "replayed_reads": Counted("replayed_reads_total", "Reads that came as the history had predicted."),
    "hedged_requests": Counted("hedged_requests_total", "Requests sent a second time, since the first was late."),
    "hedges_won": Counted("hedges_won_total", "Second requests that were quicker."),
    "catalog_errors": Counted("catalog_errors_total", "Times that the catalog could not be read or written."),
    "catalog_set_aside": Counted("catalogs_set_aside_total", "Catalogs that were damaged and made anew."),
    "verified_bytes": Counted("verified_bytes_total", "Bytes of the disk tier read only to be checked."),
    "verified_chunks": Counted("verified_chunks_total", "Chunks of the disk tier read only to be checked."),
    "verify_damaged": Counted("verify_damaged_chunks_total", "Of those, chunks that were damaged."),
    "checkpoints_saved": Counted("checkpoints_saved_total", "Parts of checkpoints that reached the store."),
    "checkpoints_failed": Counted("checkpoints_failed_total", "Parts of checkpoints that could not be saved."),
    "checkpoints_under_way": Counted("checkpoints_under_way", "Parts of checkpoints that are to be stored yet."),
    "checkpoint_written_bytes": Counted("checkpoint_written_bytes_total", "Bytes of checkpoints written to the disk."),
    "checkpoint_stored_bytes": Counted("checkpoint_stored_bytes_total", "Bytes of checkpoints sent to stores."),
    "checkpoint_ram_bytes": Counted("checkpoint_ram_bytes", "Memory that saves of checkpoints take."),
    "checkpoint_fetched_bytes": Counted("checkpoint_fetched_bytes_total", "Bytes fetched for loads of checkpoints."),
    "checkpoint_given_bytes": Counted("checkpoint_given_bytes_total", "Bytes that processes have loaded of these."),
    "checkpoint_shared_bytes": Counted("checkpoint_shared_bytes", "Memory of loads that processes share."),
    "checkpoint_disk_bytes": Counted("checkpoint_disk_bytes", "What checkpoints take on disk."),
    "arena_touched_bytes": Counted("arena_touched_bytes", "Memory that the arena takes up."),
    "buffers_leased": Counted("leased_chunks", "Chunks in RAM that consumers may read now."),
    "buffers_stranded": Counted(
        "stranded_chunks", "Buffers under a call that hangs, or under the slower of two requests."
    ),
}
# Shown by the tiers and endpoints, or by no number that changes.
LEFT_OUT = {
    *("buffers", "buffers_free", "disk_quota_bytes", "disk_used_bytes", "pid"),
    *("requests_allowed", "requests_in_flight", "throttled_requests", "timed_out_requests"),
}


class Collector:
    """What prometheus_client's registry collects at each scrape: `snapshot()`, or that none is to be had."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        try:
            snapshot = self._snapshot()
        except (FastloadError, OSError):
            yield _value("up", "Whether a service runs for the cache and answers.", 0)
            return
        yield from families(snapshot)


def families(snapshot: Snapshot) -> list[Metric]:
    """All metrics of a snapshot."""
    found = [*_of_node(snapshot), *_of_tiers(snapshot), *_of_endpoints(snapshot.endpoints)]
    found += [*_of_data_sets(snapshot.data_sets), *_of_jobs(snapshot.jobs)]
    left = SERIES_MAX - sum(len(family.samples) for family in found)
    return [*found, *_of_ranks(snapshot.consumers, left // _SERIES_OF_RANK_MAX - 2)]


def _of_node(snapshot: Snapshot) -> Iterator[Metric]:
    node = snapshot.node
    yield _value("up", "Whether a service runs for the cache and answers.", 1)
    yield _value("start_time_seconds", "When the service started, in seconds since 1970.", node.started_at)
    yield _value("cpu_seconds_total", "Processor time of the service.", node.cpu_s)
    yield _value("memory_bytes", "Memory of the service, without the arena.", node.memory_bytes)
    yield _value("consumers", "Connections that read or warm.", len(snapshot.consumers))
    yield _value("troubles", "Things about the cache that its users should know.", len(snapshot.troubles))
    for name, counted in COUNTERS.items():
        if name in node.counters:
            yield _value(counted.metric, counted.says, node.counters[name])


def _of_tiers(snapshot: Snapshot) -> Iterator[Metric]:
    tiers = {tier.name: [tier] for tier in snapshot.tiers}
    for name, says, field in (
        ("tier_limit_bytes", "How much a tier may hold.", "limit_bytes"),
        ("tier_used_bytes", "How much a tier holds.", "used_bytes"),
        ("tier_pinned_bytes", "How much of it is pinned.", "pinned_bytes"),
        ("tier_writable", "Whether a tier takes chunks (1), or has failed or is off (0).", "is_writable"),
    ):
        yield _summed(name, says, "tier", tiers, attrgetter(field))
    served = {(tier.name,): float(tier.served_bytes) for tier in snapshot.tiers}
    served["store",] = float(snapshot.node.remote_bytes)
    yield _labelled("served_bytes_total", "Bytes granted to consumers, by where they were.", ("tier",), served)


def _of_endpoints(endpoints: Sequence[Endpoint]) -> Iterator[Metric]:
    found = _grouped(reversed(endpoints), lambda each: endpoint_label(each.name), _ENDPOINTS_MAX)  # the last used first
    for name, says, field in (
        ("requests_total", "Requests sent to a store.", "requests"),
        ("throttled_requests_total", "Requests that a store throttled.", "throttled_requests"),
        ("timed_out_requests_total", "Requests that a store did not answer in time.", "timed_out_requests"),
        ("requests_in_flight", "Requests that wait for a store.", "requests_in_flight"),
        ("requests_allowed", "Requests that a store is sent at a time, as measured.", "requests_allowed"),
        ("goodput_bytes_per_second", "What a store gives, as last measured.", "bytes_per_s"),
    ):
        yield _summed(name, says, "endpoint", found, attrgetter(field))
    for name, says, field in (
        ("request_seconds", "Requests that succeeded, from their sending to their last byte.", "request_times"),
        ("first_byte_seconds", "Their first bytes, where the store says when it sent them.", "first_byte_times"),
    ):
        times = {label: [getattr(each, field) for each in of] for label, of in found.items()}
        yield _histogram(name, says, "endpoint", times)


def _of_data_sets(data_sets: Iterable[DataSet]) -> Iterator[Metric]:
    largest = sorted(data_sets, key=lambda each: (-each.ram_bytes - each.disk_bytes, each.name))
    found = _grouped(largest, lambda each: data_set_label(each.name), _DATA_SETS_MAX)
    for name, says, field in (
        ("data_set_objects", "Objects of a data set that the cache knows.", "object_count"),
        ("data_set_bytes", "Size of these objects.", "byte_count"),
        ("data_set_ram_bytes", "How much of a data set is in RAM.", "ram_bytes"),
        ("data_set_disk_bytes", "How much of a data set is on disk.", "disk_bytes"),
        ("data_set_pinned_bytes", "How much of a data set is pinned.", "pinned_bytes"),
    ):
        yield _summed(name, says, "data_set", found, attrgetter(field))


def _of_jobs(jobs: Iterable[Job]) -> Iterator[Metric]:
    found = _grouped(jobs, lambda each: data_set_label(each.name), _JOBS_MAX)
    values: tuple[tuple[str, str, Callable[[Job], float]], ...] = (
        ("job_total_bytes", "Size of what a warming job warms.", attrgetter("total_bytes")),
        ("job_held_bytes", "How much of that the cache holds.", attrgetter("held_bytes")),
        ("job_fetched_bytes", "How much the job has fetched for it.", attrgetter("fetched_bytes")),
        ("job_failed_shards", "Shards that could not be warmed.", attrgetter("failed_shards")),
        (
            "jobs_undone",
            "Warming jobs that are not done, or have lost data since.",
            lambda job: not job.is_ready,
        ),
        ("jobs_failed", "Warming jobs that have failed.", lambda job: job.state == "failed"),
    )
    for name, says, value in values:
        yield _summed(name, says, "data_set", found, value)


def _of_ranks(consumers: Iterable[Consumer], ranks_max: int) -> Iterator[Metric]:
    """What the loaders of each rank report, of their current epochs; and of consumers that are of no rank."""
    in_order = sorted(consumers, key=lambda each: (_rank(each) == NO_RANK, _number(each.report.get("rank"))))
    found = _grouped(in_order, _rank, max(1, ranks_max))
    read: dict[tuple[str, ...], float] = {}
    for rank, of in found.items():
        for tier, field in (("ram", "ram_bytes"), ("disk", "disk_bytes"), ("store", "remote_bytes")):
            read[rank, tier] = float(sum(getattr(each, field) for each in of))
    yield _labelled("rank_read_bytes_total", "Bytes that a rank read, by where they were.", ("rank", "tier"), read)

    reports = {rank: [each.report for each in of if each.report] for rank, of in found.items()}
    reports = {rank: of for rank, of in reports.items() if of}
    for name, says, key in (
        ("samples_total", "Samples delivered in the epoch.", "samples"),
        ("batches_total", "Batches delivered in the epoch.", "batches"),
        ("epoch_seconds_total", "Time since the epoch began.", "elapsed_s"),
        ("work_seconds_total", "Of that, the trainer's own time.", "work_s"),
    ):
        yield _summed(name, says, "rank", reports, lambda report, key=key: _number(report.get(key)))  # type: ignore[misc]
    stalls = {
        (rank, cause): sum(_number(_mapping(report.get("stalls")).get(cause)) for report in of)
        for rank, of in reports.items()
        for cause in CAUSES
    }
    says = "Of that, what the trainer waited, by cause."
    yield _labelled("stall_seconds_total", says, ("rank", "cause"), stalls)
    waits = {rank: [_wait(report.get("batch_wait")) for report in of] for rank, of in reports.items()}
    yield _histogram("batch_wait_seconds", "The trainer's waits for batches.", "rank", waits)


def _rank(consumer: Consumer) -> str:
    rank = consumer.report.get("rank")
    return str(rank) if type(rank) is int and 0 <= rank < _RANK_MAX else NO_RANK


def _number(value: Any) -> float:
    """One of a report, which is the consumer's to make."""
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else 0.0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _wait(value: Any) -> Histogram:
    """A histogram of a report; an empty one where it is none of ours."""
    try:
        found = msgspec.convert(value, Histogram)
    except msgspec.ValidationError:
        found = Histogram(bounds_s=[], counts=[], count=0, sum_s=0.0)
    is_ours = tuple(found.bounds_s) == BOUNDS_S and len(found.counts) == len(BOUNDS_S)
    return found if is_ours else Histogram(bounds_s=list(BOUNDS_S), counts=[0] * len(BOUNDS_S), count=0, sum_s=0.0)


def _summed(
    name: str, says: str, label: str, groups: Mapping[str, Sequence[Item]], value: Callable[[Item], float]
) -> Metric:
    return _labelled(name, says, (label,), {(each,): float(sum(map(value, of))) for each, of in groups.items()})


def _histogram(name: str, says: str, label: str, times: Mapping[str, Sequence[Histogram]]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    metric = HistogramMetricFamily(f"fastload_{name}", says, labels=(label,))
    for each, histograms in times.items():
        counts = [sum(of) for of in zip(*(histogram.counts for histogram in histograms), strict=True)]
        buckets = [(f"{bound:g}", float(count)) for bound, count in zip(BOUNDS_S, counts, strict=True)]
        total = float(sum(histogram.count for histogram in histograms))
        metric.add_metric([each], [*buckets, ("+Inf", total)], sum(histogram.sum_s for histogram in histograms))
    return metric


def _value(name: str, says: str, value: float) -> Metric:
    metric = _family(name, says, ())
    metric.add_metric([], value)
    return metric


def _labelled(name: str, says: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    metric = _family(name, says, labels)
    for each, value in values.items():
        metric.add_metric(each, value)
    return metric


def _family(name: str, says: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"fastload_{name}", says, labels=labels)


def _grouped(items: Iterable[Item], label: Callable[[Item], str], count_max: int) -> dict[str, list[Item]]:
    """By label, the first `count_max` of them, and all others under one."""
    found: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        name = label(item)
        is_known = name in found or len(found) - (OTHER in found) < count_max
        found[name if is_known else OTHER].append(item)
    return dict(found)


def data_set_label(name: str) -> str:
    """A data set's own name, of a pin or a job. A folder of a store is not shown: that would be a URL."""
    is_place = "://" in name or name.startswith(("/", "file:"))
    return UNNAMED if is_place or not name else _label(name)


def endpoint_label(name: str) -> str:
    """Host and port of an endpoint; its kind of store where that is the provider's own."""
    scheme, mark, rest = name.partition("://")
    host = rest.partition("/")[0].rpartition("@")[2]
    return _label(host or scheme) if mark else _label(name) or "default"


def _label(text: str) -> str:
    """Of any text, what may stand in a label."""
    return "".join(each if each.isprintable() else "?" for each in text[:_LABEL_CHARACTERS_MAX])
