"""The manifest: numbers, fingerprints, and its way through JSON."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError
from fastload.plan import Manifest, OrderOptions, epoch_order, epoch_orders, next_version
from fastload.store.types import ObjectInfo

INFO = ObjectInfo("s3://bucket/a.tar", 10, "etag", 5)
objects = st.lists(
    st.builds(
        ObjectInfo,
        st.text(max_size=20),
        st.integers(0, 2**50),
        st.none() | st.text(max_size=8),
        st.integers(0, 2**62),
    ),
    max_size=8,
)


def test_chunks_are_numbered_through_all_objects():
    manifest = Manifest(ObjectInfo(f"u{i}", size) for i, size in enumerate([0, 1, 4096, 4097, 10_000]))
    assert manifest.first_chunk(4096).tolist() == [0, 0, 1, 2, 4, 7]
    assert manifest.sizes.tolist() == [0, 1, 4096, 4097, 10_000]
    assert Manifest([]).first_chunk(4096).tolist() == [0]


def test_what_it_gives_out_cannot_be_changed():
    manifest = Manifest([INFO])
    for array in (manifest.sizes, manifest.first_chunk(4096)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_fingerprint_sees_every_field_and_the_order():
    other = ObjectInfo("s3://bucket/b.tar", 10, "etag", 5)
    lists = [
        [],
        [INFO],
        [INFO, INFO],
        [INFO, other],
        [other, INFO],
        [ObjectInfo(INFO.url, 11, "etag", 5)],
        [ObjectInfo(INFO.url, 10, "other", 5)],
        [ObjectInfo(INFO.url, 10, None, 5)],
        [ObjectInfo(INFO.url, 10, "etag", 6)],
    ]
    assert len({Manifest(each).fingerprint for each in lists}) == len(lists)
    assert Manifest([INFO]).fingerprint == GOLDEN


GOLDEN = "22e1f2d302b9f41d5e9fb29750803408"


def test_what_was_saved_before_there_were_versions_stays_as_it_is():
    assert Manifest([INFO]).to_json() == (
        b'{"version":1,"fingerprint":"%s","objects":[["s3://bucket/a.tar",10,"etag",5]]}' % GOLDEN.encode()
    )


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_the_fingerprint_is_that_of_all_rows_as_one_msgpack_array(count):
    rows = [(f"u{number}", number, None if number % 2 else "e", number) for number in range(count)]
    digest = hashlib.blake2b(msgspec.msgpack.encode(rows), digest_size=16).hexdigest()
    assert Manifest(ObjectInfo(*row) for row in rows).fingerprint == digest


@st.composite
def manifests(draw):
    """Manifests as a few listings one after the other leave them."""
    manifest = Manifest(draw(objects))
    for infos in draw(st.lists(st.lists(st.sampled_from(UNIVERSE), max_size=6), max_size=3)):
        promised = draw(st.none() | st.lists(st.integers(-1, 5), min_size=len(infos), max_size=len(infos)))
        sidecars = draw(st.lists(st.sampled_from(UNIVERSE), max_size=1))
        manifest = next_version(manifest, Manifest(infos, promised=promised, sidecars=sidecars))
    return manifest


@given(manifests())
def test_json_and_pickle_bring_back_the_same(manifest):
    for again in (Manifest.from_json(manifest.to_json()), pickle.loads(pickle.dumps(manifest))):
        assert again == manifest
        assert again.fingerprint == manifest.fingerprint
        assert hash(again) == hash(manifest)
        assert again.sidecars == manifest.sidecars
        assert (again.promised is None) == (manifest.promised is None)
        np.testing.assert_array_equal(again.promised, manifest.promised)
        np.testing.assert_array_equal(again.is_there, manifest.is_there)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "m.json is not a manifest"),
        (b"[]", "m.json is not a manifest"),
        (b'{"version": 1}', "missing required field `fingerprint`"),
        (b'{"version": 9, "fingerprint": "", "objects": []}', "version 9; this fastload reads version 1"),
        (b'{"version": 1, "fingerprint": "feed", "objects": []}', "fingerprint feed, but its objects have"),
        (b'{"version": 1, "fingerprint": "", "objects": [["u", "1", null, 0]]}', r"objects\[0\]\[1\]"),
    ],
)
def test_what_is_not_a_manifest_is_refused_by_name(data, message):
    with pytest.raises(ConfigError, match=message):
        Manifest.from_json(data, "m.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"objects": [["u", -1, null, 0]]', r"objects\[0\]\[1\]"),
        ('"objects": [["u", 1, null, 9223372036854775808]]', r"objects\[0\]\[3\]"),
        ('"objects": [["u", 1, null, 0, 0, 1, "gzip", 0]]', "Expected `array` of at most length 7"),
        ('"objects": [["u", 1, null, 0, 0, 1, "rar"]]', "no packing is called 'rar'"),
        ('"objects": [["u", 1, null, 0, 1, 1, "gzip"]]', "a piece of an object is none of it"),
        ('"objects": [["u", 1, null, 0, 0, -1, "gzip"]]', "a piece of an object is none of it"),
        ('"objects": [["u", 1, null, 0, 1]]', "a piece of an object is none of it"),
        ('"objects": [["u", 2, null, 0, 1, 2]]', "a piece of an object is none of it"),
        ('"objects": [["u", 2, null, 0, -1, 2]]', r"objects\[0\]\[4\]"),
        ('"objects": [["u", 1, null, 0]], "version_starts": [1]', r"versions of 1 objects begin at \(1,\)"),
        ('"objects": [["u", 1, null, 0]], "version_starts": [0]', r"versions of 1 objects begin at \(0,\)"),
        ('"objects": [["u", 1, null, 0]], "gone": [1]', "1 objects are gone whose numbers"),
        ('"objects": [["u", 1, null, 0]], "gone": [0, 0]', "2 objects are gone whose numbers"),
        ('"objects": [["u", 1, null, 0]], "promised": [1, 2]', "2 sample counts for 1 objects"),
        ('"objects": [], "extra": 1', "unknown field `extra`"),
    ],
)
def test_what_contradicts_itself_is_refused(fields, message):
    data = f'{{"version": 1, "fingerprint": "", {fields}}}'
    with pytest.raises(ConfigError, match=f"m.json .*{message}"):
        Manifest.from_json(data, "m.json")


def test_the_repr_is_short():
    assert repr(Manifest([INFO] * 1000)).startswith("Manifest(1000 objects, 10000 bytes, ")
    assert repr(Manifest([INFO] * 3, gone=[1])).startswith("Manifest(3 objects, 1 gone, 30 bytes, ")


def test_urls_by_number():
    manifest = Manifest(ObjectInfo(f"s3://b/é{number}", 1) for number in range(5))
    assert manifest.urls_of(np.array([4, 0, 0, 4], np.int32)) == ["s3://b/é4", "s3://b/é0", "s3://b/é0", "s3://b/é4"]
    assert manifest.urls_of(np.array([], np.int64)) == []


# Versions. Names with one or two versions of each, so that listings often share, lose, change and double objects.

UNIVERSE = [ObjectInfo(f"u{number}", 10 + number, etag, 0) for number in range(6) for etag in ("a", "b")]
listings = st.lists(st.lists(st.sampled_from(UNIVERSE), max_size=8), min_size=1, max_size=6)


def present(manifest):
    return [info for info, there in zip(manifest.objects, manifest.is_there, strict=True) if there]


@given(listings)
def test_versions_follow_the_listings(lists):
    manifest = Manifest(lists[0])
    for infos in lists[1:]:
        old, manifest = manifest, next_version(manifest, Manifest(infos))
        # It holds what was listed, each as often.
        assert Counter(present(manifest)) == Counter(infos)
        again = next_version(manifest, Manifest(infos))
        assert again is manifest
        if manifest is old:
            continue
        kept = list((Counter(present(old)) & Counter(infos)).elements())
        if len(manifest.gone) or manifest.version_starts[: len(old.version_starts)] == old.version_starts != ():
            assert 2 * len(manifest.gone) <= len(manifest)
        if list(manifest.objects[: len(old)]) == list(old.objects):
            # Numbers stayed; what is new comes behind, in the order of the listing.
            fresh = list(manifest.objects[len(old) :])
            assert Counter(fresh) == Counter(infos) - Counter(old.objects)
            assert is_subsequence(fresh, infos)
            starts = (len(old),) if fresh and len(old) else ()
            assert manifest.version_starts == old.version_starts + starts
        else:
            # More than half were gone: all are numbered anew, in the same order.
            assert not len(manifest.gone)
            assert manifest.version_starts == ()
            assert is_subsequence(kept_in_order(old, infos), list(manifest.objects))
        assert len(kept) <= len(manifest)
        assert len({old.fingerprint, manifest.fingerprint}) == 2


def kept_in_order(old, infos):
    left = Counter(infos)
    kept = []
    for info in old.objects:
        if left[info]:
            left[info] -= 1
            kept.append(info)
    return kept


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


def test_a_corpus_that_grows():
    one, two, three = (ObjectInfo(f"s3://b/{name}.tar", 10, "e") for name in "acb")
    first = Manifest([one, two])
    second = next_version(first, Manifest([one, three, two]))
    assert list(second.objects) == [one, two, three]
    assert second.version_starts == (2,)
    changed = ObjectInfo(one.url, 11, "f")
    third = next_version(second, Manifest([changed, three, two]))
    assert list(third.objects) == [one, two, three, changed]
    assert (third.version_starts, third.gone.tolist(), third.is_there.tolist()) == ((2, 3), [0], [0, 1, 1, 1])
    # The old one comes back: under its old number.
    assert next_version(third, Manifest([one, three, two, changed])).gone.tolist() == []
    # A time of change under the same ETag is no change.
    later = ObjectInfo(two.url, 10, '"e"', 99)
    assert next_version(first, Manifest([one, later])) is first
    # More than half gone.
    fourth = next_version(third, Manifest([changed]))
    assert (list(fourth.objects), fourth.version_starts, len(fourth.gone)) == ([changed], (), 0)
    assert next_version(Manifest([]), Manifest([one])).version_starts == ()


def test_what_is_said_of_objects_goes_with_them():
    one, two, three = (ObjectInfo(f"u{number}", 10, "e") for number in range(3))
    first = Manifest([one, two], promised=[5, 6])
    second = next_version(first, Manifest([three, two], promised=[7, 8], sidecars=[INFO]))
    assert second.promised.tolist() == [-1, 8, 7]
    assert list(second.sidecars) == [INFO]
    third = next_version(second, Manifest([three, two]))
    assert third == second
    assert third.fingerprint == second.fingerprint
    assert third.promised is None
    assert len(third.sidecars) == 0
    assert next_version(third, Manifest([three, two])) is third


@given(listings, st.integers(1, 3))
def test_what_stays_keeps_its_partition_and_the_rest_of_a_listing_is_in_the_order(lists, partitions):
    manifest = Manifest(lists[0])
    options = OrderOptions(shuffle="shards", partitions=partitions)
    where = {}
    for infos in lists[1:]:
        old, manifest = manifest, next_version(manifest, Manifest(infos))
        orders = epoch_orders(manifest, options, epoch=1)
        numbers = np.sort(np.concatenate([order.object_order for order in orders]))
        assert numbers.tolist() == np.flatnonzero(manifest.is_there).tolist()
        before = where if list(manifest.objects[: len(old)]) == list(old.objects) else {}
        where = {number: order.partition for order in orders for number in order.object_order.tolist()}
        assert {number: where[number] for number in before if number in where}.items() <= before.items()
        assert epoch_order(manifest, options, 1, partitions - 1).object_order.tolist() == (
            orders[-1].object_order.tolist()
        )
