"""What the service keeps of the lists of objects that consumers attach: one record an object, however many name it."""

from __future__ import annotations

import gc

from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.cache import object_id
from fastload.protocol import ObjectRows
from fastload.service.state import ObjectPiece, Objects
from fastload.store.types import ObjectInfo

CHUNK_BYTES = 1 << 16
INFOS = [ObjectInfo(f"s3://b/{number}", number, f"{number:032x}") for number in range(4)]
lists = st.lists(st.sampled_from(INFOS), max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), lists, st.sampled_from(["", "http://x"])), max_size=12))
def test_an_object_has_one_record_for_as_long_as_a_list_names_it(steps) -> None:  # type: ignore[no-untyped-def]
    objects = Objects(CHUNK_BYTES)
    held: list[tuple[ObjectPiece, list[ObjectInfo], str]] = []
    for is_new, infos, endpoint in steps:
        if is_new or not held:
            piece = objects.use_rows(ObjectRows.of(infos), endpoint)
            assert [entry.info for entry in piece] == infos
            assert all(piece is other for other, *same in held if same == [infos, endpoint])
            held.append((piece, infos, endpoint))
            del piece
        else:
            piece, infos, endpoint = held.pop(len(infos) % len(held))
            entries = list(piece)
            del piece
            objects.unuse(entries)
            del entries
        for info in INFOS:
            # An ETag that the bytes give makes the endpoint no part of what an object is.
            entry = objects.get(object_id(info, CHUNK_BYTES, ""))
            uses = sum(infos.count(info) for _, infos, _ in held)
            assert (entry.user_count if entry is not None else 0) == uses
            del entry
    gc.collect()
    assert len(objects._pieces) == len({id(piece) for piece, *_ in held})
