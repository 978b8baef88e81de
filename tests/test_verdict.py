"""Verdicts by a table, and what holds of all of them."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.stats import PlainMeter, empty_stats
from fastload.timing.activity import CAUSES
from fastload.timing.verdict import KEEPS_UP_SHARE, SHORT_S, Figures, StoreFigures, figures_of, verdict

MIB = 1 << 20
LINK = StoreFigures(
    requests=100,
    requests_allowed=8,
    bytes_per_s=20e6,
    connection_bytes_per_s=2.5e6,
    first_byte_s=0.02,
    request_bytes=8 * MIB,
    saturated_at=6,
)
but = msgspec.structs.replace
NOT_SATURATED = but(LINK, saturated_at=0)
DECODING = {"decode": 19.2}


def figures(cause: str = "fetch", share: float = 0.8, **more: object) -> Figures:
    return Figures(elapsed_s=10.0, stalls={cause: 10.0 * share}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_figures", "bound_by", "said"),
    [
        (figures("decode", 0.9, busy=DECODING, makers=2, cores=2, decodes_images=True), "decode",
         "decode-bound: 96% of 2 cores decode images; more prefetch will not help; consider smaller stored images"),
        (figures("decode", busy={"decode": 9.5}, makers=1, cores=8), "decode",
         "1 worker of 8 cores decodes values 95% of the time; raise num_workers to 8"),
        (figures("decode", busy={"decode": 4.0}, makers=2, cores=2), "decode", "20% of 2 cores decode values"),
        (figures("decompress", busy={"decompress": 20}, makers=2, cores=2), "decompress", "decompress values"),
        (figures("fetch", store=LINK), "link", "the store gives 19.1 MiB/s over 8 requests"),
        (figures("fetch", store=but(LINK, fetched_per_s=19e6)), "link", "more of them bring no more"),
        # The link gives more than was fetched; whether it does was not seen; and the time goes elsewhere.
        (figures("fetch", store=but(LINK, fetched_per_s=5e6)), "fetch", "4.8 MiB/s, up to 8 requests"),
        (figures("fetch", store=NOT_SATURATED), "fetch", "20 ms to its first byte and 3355 ms after"),
        (figures("fetch", store=but(NOT_SATURATED, first_byte_s=5.0)), "latency", "5000 ms for its"),
        (figures("fetch", store=but(LINK, refused=7)), "throttled", "refuses 7% of 100 requests"),
        (figures("fetch"), "fetch", "warm the cache beforehand"),
        (figures("fetch", leases=100, recalls=60, ram_bytes=64 * MIB), "memory", "60% of the chunks leased"),
        (figures("disk", leases=100, recalls=60), "memory", "raise ram_bytes"),
        (figures("disk", leases=100, recalls=5), "disk", "faster disk"),
        (figures("map", busy={"map": 10.0}, makers=1, cores=1), "map", "map() or map_batch() take 100%"),
        (figures("map", busy={"map": 10.0}, map_cpu_s=9.0, makers=1, cores=1), "map", "make them quicker"),
        # Threads that share an interpreter: each runs for a quarter of its time, and none of them waits.
        (figures("map", busy={"map": 40.0}, map_cpu_s=10.0, makers=4, cores=4), "map", "make them quicker"),
        (figures("map", busy={"map": 20.0}, map_cpu_s=0.4, makers=2, cores=2), "map",
         "and wait or sleep for 98% of that; raise num_workers, also beyond the number of cores"),
        (figures("map", is_ours=False), "map", "the data set's own code"),
        (figures("collate"), "collate", "arrays of one shape"),
        (figures("transfer"), "transfer", "to the device"),
        (figures("index"), "index", "fastload index"),
        (figures("listing"), "listing", "manifest"),
        (figures("startup"), "startup", "first_batch_s"),
        (figures("service"), "service", "free core"),
        (figures("other"), "other", "free core"),
        (figures("fetch", 0.02), "consumer", "the trainer waits 2% of the time"),
        (Figures(elapsed_s=0.3, stalls={"fetch": 0.3}), "unknown", "too short to say: 0.3 s"),
    ],
)  # fmt: skip
def test_what_is_said(given_figures: Figures, bound_by: str, said: str) -> None:
    found = verdict(given_figures)
    assert found.bound_by == bound_by
    assert said in found.sentence
    assert "\n" not in found.sentence


def test_the_largest_cause_is_named_with_its_share() -> None:
    found = verdict(Figures(elapsed_s=10.0, stalls={"fetch": 2.0, "decode": 3.0, "other": 1.0}, makers=1, cores=1))
    assert found.cause == "decode"
    assert "the trainer waits 60% of the time, 30% for this" in found.sentence


REFINED = {"fetch": {"link", "latency", "throttled", "fetch", "memory"}, "disk": {"disk", "memory"}}
REFINED["service"] = {"service", "memory"}
SECONDS = st.floats(0.0, 1e4)
STORES = st.builds(
    StoreFigures,
    requests=st.integers(0, 10**6),
    refused=st.integers(0, 10**6),
    requests_allowed=st.integers(0, 256),
    bytes_per_s=st.floats(0, 1e11),
    connection_bytes_per_s=st.floats(0, 1e10),
    first_byte_s=st.floats(0, 100),
    request_bytes=st.integers(0, 1 << 30),
    saturated_at=st.integers(0, 256),
    fetched_per_s=st.floats(0, 1e11),
)
FIGURES = st.builds(
    Figures,
    elapsed_s=SECONDS,
    stalls=st.dictionaries(st.sampled_from(CAUSES), SECONDS),
    busy=st.dictionaries(st.sampled_from(CAUSES), SECONDS),
    map_cpu_s=st.just(-1.0) | SECONDS,
    makers=st.integers(0, 64),
    cores=st.integers(0, 64),
    decodes_images=st.booleans(),
    is_ours=st.booleans(),
    ram_bytes=st.integers(0, 1 << 40),
    leases=st.integers(0, 10**6),
    recalls=st.integers(0, 10**6),
    store=STORES,
)


@given(given_figures=FIGURES)
def test_it_never_contradicts_the_largest_cause(given_figures: Figures) -> None:
    found = verdict(given_figures)
    waited_s = sum(given_figures.stalls.values())
    elapsed_s = max(given_figures.elapsed_s, waited_s)
    if found.bound_by == "unknown":
        assert elapsed_s < SHORT_S
    elif found.bound_by == "consumer":
        assert waited_s < KEEPS_UP_SHARE * elapsed_s
    else:
        assert given_figures.stalls[found.cause] == max(given_figures.stalls.values())
        assert found.bound_by in REFINED.get(found.cause, {found.cause})


@given(given_figures=FIGURES, more_s=SECONDS)
def test_more_of_what_it_names_does_not_change_it(given_figures: Figures, more_s: float) -> None:
    found = verdict(given_figures)
    if not found.cause:
        return
    stalls = {**given_figures.stalls, found.cause: given_figures.stalls[found.cause] + more_s}
    longer = msgspec.structs.replace(given_figures, stalls=stalls, elapsed_s=given_figures.elapsed_s + more_s)
    assert verdict(longer).bound_by == found.bound_by


@given(given_figures=FIGURES, more_s=SECONDS)
def test_more_work_of_the_trainer_never_names_another_cause(given_figures: Figures, more_s: float) -> None:
    found = verdict(given_figures)
    longer = verdict(msgspec.structs.replace(given_figures, elapsed_s=given_figures.elapsed_s + more_s))
    assert longer.bound_by in ({found.bound_by, "consumer"} if found.bound_by != "unknown" else {longer.bound_by})


ODD = st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=5), st.booleans(), st.just(10**400))


@given(
    elapsed_s=ODD,
    stalls=st.dictionaries(st.sampled_from([*CAUSES, "?"]), ODD),
    others=st.lists(ODD, min_size=8, max_size=8),
)
def test_odd_figures_never_raise(elapsed_s: object, stalls: dict[str, object], others: list[object]) -> None:
    store = StoreFigures(refused=others[0], bytes_per_s=others[1], first_byte_s=others[2])  # type: ignore[arg-type]
    odd = Figures(  # type: ignore[call-arg]  # as they may come from another process
        elapsed_s=elapsed_s, stalls=stalls, busy={"decode": others[3]}, makers=others[4], cores=others[5],
        ram_bytes=others[6], leases=others[7], recalls=others[0], store=store,
    )  # fmt: skip
    found = verdict(odd)
    assert found.sentence
    assert "nan" not in found.sentence


def test_figures_from_a_report() -> None:
    assert figures_of({"elapsed_s": 3.0, "stalls": {"map": 1.0}, "rank": 0, "batches": 7}).stalls == {"map": 1.0}
    for wrong in ({}, {"elapsed_s": "3", "stalls": {}}, {"elapsed_s": 3.0, "stalls": [1]}):
        with pytest.raises(msgspec.ValidationError):
            figures_of(wrong)


def test_before_anything_has_happened() -> None:
    assert empty_stats(3)["bound_by"] == PlainMeter(0, 2).stats()["bound_by"] == "unknown"
    assert math.isclose(sum(value for name, value in empty_stats(3).items() if name.startswith("stall_")), 0.0)
