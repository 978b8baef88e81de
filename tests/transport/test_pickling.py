"""Objects are pickled in the way that was registered last, and tensors apart from their memory."""

from __future__ import annotations

import copyreg
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.transport.pickling import buffers_of, dump_apart, forking_dumps, memory_of


class Odd:
    """A class whose pickles users decide about."""


def as_text(text: str) -> Any:
    return lambda value: (str, (text,))


def test_reducers_that_users_register_and_replace_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copyreg, "dispatch_table", dict(copyreg.dispatch_table))
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", dict(ForkingPickler._extra_reducers))
    assert isinstance(pickle.loads(forking_dumps(Odd())), Odd)
    for text in ("one", "two"):
        copyreg.pickle(Odd, as_text(text))
        assert pickle.loads(forking_dumps(Odd())) == text
    for text in ("three", "four"):
        ForkingPickler.register(Odd, as_text(text))
        assert pickle.loads(forking_dumps(Odd())) == text


def crossed(value: Any, is_shared: bool = False) -> tuple[Any, int]:
    """What arrives, and how many bytes of memory that took."""
    stream = io.BytesIO()
    buffers, where = buffers_of(dump_apart(value, stream))
    copies = [buffer.copy() for buffer in buffers]
    arrived = pickle.loads(stream.getvalue(), buffers=memory_of(copies, where, is_shared=is_shared))
    return arrived, sum(buffer.nbytes for buffer in buffers)


@st.composite
def views(draw: st.DrawFn) -> list[tuple[int, torch.dtype, int, tuple[int, ...], tuple[int, ...]]]:
    """Of storages of 4 KB and 4 MB: which, as what, from where, of what shape and strides."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        storage, kind = draw(st.integers(0, 1)), draw(st.sampled_from([torch.uint8, torch.int32, torch.complex128]))
        room = (4_000_000 if storage else 4000) // kind.itemsize
        lengths, strides, last = [], [], 0
        for _ in range(draw(st.integers(0, 3))):
            lengths.append(draw(st.integers(0, 5)))
            strides.append(draw(st.integers(0, 10) | st.integers(0, (room - 1 - last) // 5)))
            last += max(0, lengths[-1] - 1) * strides[-1]
            if last >= room - 60:
                break
        if last >= room:
            continue
        found.append((storage, kind, draw(st.integers(0, room - 1 - last)), tuple(lengths), tuple(strides)))
    return found


@settings(deadline=None, max_examples=150)
@given(views())
def test_views_are_what_they_were_and_what_lay_in_the_same_memory_does(made: Any) -> None:
    bases = [torch.arange(size, dtype=torch.int32).view(torch.uint8) for size in (1000, 1_000_000)]
    sent = [
        torch.empty(0, dtype=kind).set_(bases[storage].untyped_storage(), offset, shape, strides)
        for storage, kind, offset, shape, strides in made
    ]
    arrived, crossed_bytes = crossed(sent)
    seen_bytes = 0
    for before, after in zip(sent, arrived, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert before.numpy().tobytes() == after.numpy().tobytes()  # some are no numbers
        seen_bytes += before.nbytes
    assert crossed_bytes <= 4 * seen_bytes + (1 << 17) * (1 + len(sent))
    kept = [i for i, (a, b) in enumerate(zip(sent, arrived, strict=True)) if a.numel() and a.stride() == b.stride()]
    for i in kept:  # where one lay before the other, it does so now
        for j in kept:
            if made[i][0] == made[j][0] and arrived[i].untyped_storage()._cdata == arrived[j].untyped_storage()._cdata:
                between = sent[i].data_ptr() - sent[j].data_ptr(), arrived[i].data_ptr() - arrived[j].data_ptr()
                assert between[0] == between[1]
    small = {
        tensor.untyped_storage()._cdata for tensor, (storage, *_) in zip(arrived, made, strict=True) if not storage
    }
    assert len(small) <= 1  # of so little all goes


@pytest.mark.parametrize(
    ("value", "expected_bytes"),
    [
        (torch.zeros(1).expand(1 << 20), 4),
        (torch.zeros(4, 1).expand(4, 1 << 20), 16),
        ([torch.zeros(1 << 20)[5:7]], 8),
        (torch.zeros(2000, 5000)[:, 3], 8000),
        ([torch.zeros(1000)] * 3, 4000),
        ([(x := torch.zeros(1 << 16)), x[3:], x[::2], x.view(256, 256).t()], 4 << 16),
        ([(y := torch.zeros(1 << 22))[:10], y[-10:]], 80),
        (torch.zeros(0, 7), 0),
    ],
)
def test_no_more_crosses_than_has_to(value: Any, expected_bytes: int) -> None:
    assert expected_bytes <= crossed(value)[1] <= expected_bytes + 16


def test_one_of_two_that_overlap_is_written_to_through_the_other() -> None:
    large = torch.zeros(1 << 20)
    (one, other, away), _ = crossed([large[100:200], large[150:250], large[-5:]])
    one[-1] = 7
    assert other[49] == 7
    assert one.untyped_storage()._cdata == other.untyped_storage()._cdata != away.untyped_storage()._cdata
    assert large[199] == 0


def test_tensors_say_that_they_are_shared_only_where_they_are_and_as_long() -> None:
    sent = [torch.ones(3), torch.ones(1 << 15), torch.ones(3)[1:1]]
    for tensor in crossed(sent, is_shared=True)[0]:
        assert tensor.is_shared()
        assert tensor[:0].is_shared()
        assert not tensor.clone().is_shared()
        assert not pickle.loads(pickle.dumps(tensor)).is_shared()
    assert not any(tensor.is_shared() for tensor in crossed(sent)[0])


def test_arrays_that_may_not_be_written_to_arrive_as_others_that_may() -> None:
    array = np.arange(1 << 15)
    array.flags.writeable = False
    arrived, crossed_bytes = crossed([array, array[:3]])
    assert crossed_bytes == array.nbytes
    for part in arrived:
        part += 1
    assert array[0] == 0
