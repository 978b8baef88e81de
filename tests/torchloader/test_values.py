"""Odd tensors out of a worker process: what arrives is what torch's own loader hands over."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data

import fastload
from fastload.transport.packing import Arrived, Packed, Packer, Receiver
from fastload.transport.worker_slots import SlotCounters


class Fancy(torch.Tensor):
    """A subclass of the user's."""


def _views() -> Any:
    whole = torch.arange(12.0)
    return {"whole": whole, "rows": whole.view(3, 4), "row": whole[4:8], "every other": whole[::2], "alike": whole[4:8]}


def _with_views_of_other_types() -> Any:
    numbers = torch.arange(8, dtype=torch.int32)
    return numbers, numbers.view(torch.float32), numbers.view(torch.uint8)[8:], torch.view_as_complex(torch.ones(4, 2))


def _on_one_storage() -> Any:
    numbers = torch.arange(6.0)
    return [numbers, torch.nn.Parameter(numbers), numbers.as_subclass(Fancy), numbers[2:], numbers.detach()]


def _large() -> Any:
    large = torch.arange(300_000)
    return {"large": large, "part": large[1000:200_000], "small part": large[:3], "none of it": large[5:5]}


def _rows_of_a_large_one() -> Any:
    table = torch.arange(4_000_000).view(1000, 4000)
    return table[3], table[3, 5:9]


VALUES: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.arange(6.0).view(2, 3),
    "views": _views,
    "views in another type": _with_views_of_other_types,
    "the same twice": lambda: [torch.ones(3)] * 2,
    "one storage, many kinds": _on_one_storage,
    "large, with views": _large,
    "rows of a large one": _rows_of_a_large_one,
    "expanded": lambda: torch.tensor([7.0]).expand(1000, 1000),
    "expanded rows": lambda: torch.arange(3).view(3, 1).expand(3, 50_000),
    "strided": lambda: torch.arange(20.0)[3::2],
    "large and strided": lambda: torch.arange(400_000)[1::3],
    "transposed": lambda: torch.arange(6).view(2, 3).t(),
    "permuted": lambda: torch.arange(36_000.0).view(4, 60, 50, 3).permute(3, 0, 2, 1),
    "channels_last": lambda: torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "overlapping": lambda: torch.arange(10).as_strided((4, 3), (2, 1)),
    "unfolded": lambda: torch.arange(10.0).unfold(0, 4, 2),
    "no dimension": lambda: torch.tensor(3),
    "no elements": lambda: [torch.empty(0), torch.empty(3, 0, 2), torch.ones(5)[2:2]],
    "no elements, strided": lambda: torch.empty_strided((0, 3), (7, 2)),
    "complex": lambda: [torch.ones(3, dtype=torch.complex64), torch.ones(2, dtype=torch.complex128)],
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "requires grad": lambda: [torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(2))],
    "subclass": lambda: [torch.ones(3).as_subclass(Fancy), torch.ones(200_000).as_subclass(Fancy)],
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(5.0), 0.1, 3, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged),
    "types": lambda: [
        torch.ones(2, dtype=kind)
        for kind in (torch.bool, torch.bfloat16, torch.float16, torch.uint8, torch.int16, torch.float8_e5m2)
    ],
    "storages": lambda: [torch.ones(3).untyped_storage(), torch.ones(200_000).untyped_storage()],
    "of numpy": lambda: torch.from_numpy(np.arange(10)[::2].copy()),
    "in a namedtuple": lambda: torch.return_types.max((torch.ones(2), torch.zeros(2))),
}


class Odd(torch.utils.data.Dataset[Any]):
    """Each of the values is made where it is asked for."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Any:
        return VALUES[self._names[number]]()


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    if isinstance(value, torch.UntypedStorage):
        return [torch.empty(0, dtype=torch.uint8).set_(value)]
    return [value]


def described(value: Any) -> list[Any]:
    """All that can be said of tensors of a batch, and which of them share memory."""
    tensors = leaves(value)
    looks: list[Any] = [type(value)]
    storages: dict[int, int] = {}
    for tensor in tensors:
        about: list[Any] = [type(tensor), tensor.dtype, tensor.layout, tensor.requires_grad, tensor.is_leaf]
        if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
            storage = tensor.untyped_storage()
            about += [tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg(), tensor.is_shared()]
            about += [storages.setdefault(storage._cdata, len(storages)), tensor.is_inference()]
            about.append(tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().tolist())
        else:
            about.append(text_of(tensor))
        looks.append(about)
    return looks


def text_of(tensor: torch.Tensor) -> str:
    try:
        return re.sub(r"j\d+", "j", str(tensor))  # numbered as they are made
    except RuntimeError as error:  # what torch's loader makes of a quantized tensor cannot be printed
        return str(error)


def told_by(kind: Any, names: list[str], **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        loader = kind(Odd(names), batch_size=None, num_workers=1, collate_fn=lambda value: value, **options)
        return {name: described(value) for name, value in zip(names, loader, strict=True)}


@pytest.mark.parametrize("kind", [torch.utils.data.DataLoader, fastload.DataLoader])
def test_a_child_writes_to_the_same_memory(kind: Any) -> None:
    """As `is_shared()` says, for small tensors and large ones."""
    names = ["plain", "large and strided"]
    loader = kind(Odd(names), batch_size=None, num_workers=1, collate_fn=leaves)
    tensors = [tensors[0] for tensors in loader]
    child = os.fork()
    if not child:
        try:
            for tensor in tensors:
                tensor.numpy()[...] = -5  # torch would ask threads that stayed in the parent
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all((tensor == -5).all() for tensor in tensors)


def test_small_memory_is_used_again_and_not_before() -> None:
    receiver = Receiver(SlotCounters(1))
    receiver.counters.set_open(0)
    packer = Packer(receiver.counters, receiver.number, 0, 1 << 20)
    kept, places = [], set()
    for number in range(40):
        packed = packer.pack(Arrived([torch.full((5,), number), torch.full((700,), number)]))
        assert isinstance(packed, Packed)
        first, second = receiver.unpack(packed).batch
        places.add(second.data_ptr())
        if number % 10 == 0:
            kept.append(first)  # and with it what was next to it
        del first, second
    assert [tensor.tolist() for tensor in kept] == [[number] * 5 for number in range(0, 40, 10)]
    assert len(places) <= len(kept) + 2
    receiver.counters.close_fd()


def test_what_arrives_is_what_torchs_loader_hands_over() -> None:
    names = list(VALUES)
    ours, theirs = told_by(fastload.DataLoader, names), told_by(torch.utils.data.DataLoader, names)
    for name in names:
        assert ours[name] == theirs[name], name
