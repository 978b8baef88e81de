"""The manifest: numbers, fingerprints, and its way through JSON."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError
from fastload.plan import Manifest
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


@given(objects)
def test_json_and_pickle_bring_back_the_same(infos):
    manifest = Manifest(infos)
    for again in (Manifest.from_json(manifest.to_json()), pickle.loads(pickle.dumps(manifest))):
        assert again == manifest
        assert again.fingerprint == manifest.fingerprint
        assert hash(again) == hash(manifest)


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


def test_the_repr_is_short():
    assert repr(Manifest([INFO] * 1000)).startswith("Manifest(1000 objects, 10000 bytes, ")
