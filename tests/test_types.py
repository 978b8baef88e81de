"""What a type checker is told: what a loader gives follows from its data set, where that can be said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CODE = """
from typing import Any
import torch
from torch.utils.data import TensorDataset
import fastload

decode = {"jpg": fastload.decode.image(size=224)}
rows = fastload.StreamingDataset("a.tar", decode=decode, shuffle=True)
tuples = fastload.StreamingDataset("a.tar", decode=decode, as_tuple=True)

def size(batch: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(len(batch))

for batch in fastload.DataLoader(rows, batch_size=4, num_workers=2):
    reveal_type(batch)  # dict[str, Any]
for columns in fastload.DataLoader(tuples, 4):
    reveal_type(columns)  # tuple[Any, ...]
for made in fastload.DataLoader(rows.map_batch(size), 4):
    reveal_type(made)  # torch._tensor.Tensor
def same(sample: dict[str, Any]) -> dict[str, Any]:
    return sample

again = fastload.StreamingDataset("a.tar")
again = again.map(same).map_batch(same).map_batch(lambda batch: batch)  # what is the same may have the same name
for batch in fastload.DataLoader(again):
    reveal_type(batch)  # dict[str, Any]
for number in rows.map(len):
    reveal_type(number)  # int
again = again.map(len)  # error
for mapped in fastload.DataLoader(rows.map(len), 4):
    reveal_type(mapped)  # Any
for collated in fastload.DataLoader(rows, 4, collate_fn=len):
    reveal_type(collated)  # Any
for mixed in fastload.DataLoader(fastload.Mixture([(rows, 1.0), (rows, [(0, 1.0), (9, 0.5)])])):
    reveal_type(mixed)  # dict[str, Any]
for sample in rows:
    reveal_type(sample["jpg"])  # Any

foreign = TensorDataset(torch.zeros(3))
for tensors in fastload.DataLoader(foreign, 4):
    reveal_type(tensors)  # Any
reveal_type(fastload.DataLoader(foreign, 4))  # fastload.loader.DataLoader[tuple[torch._tensor.Tensor, ...]]

def takes(loader: torch.utils.data.DataLoader[Any], ours: fastload.DataLoader[Any]) -> fastload.StreamingDataset:
    for batch in ours:
        reveal_type(batch)  # Any
    return tuples

takes(fastload.DataLoader(rows), fastload.DataLoader(foreign))
fastload.StreamingDataset("a.tar", seed="0")  # error
fastload.DataLoader(rows, num_workers="4")  # error
"""


def test_what_a_type_checker_is_told(tmp_path: Path) -> None:
    path = tmp_path / "typed.py"
    path.write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", str(path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    revealed = {int(line): kind for line, kind in re.findall(r':(\d+): note: Revealed type is "(.*)"', said)}
    wrong = {int(line) for line in re.findall(r":(\d+): error:", said)}
    for number, line in enumerate(CODE.splitlines(), 1):
        code, _, expected = line.partition("  # ")
        if "reveal_type(" in code:
            assert revealed.pop(number, None) == expected, (line, said)
        assert (number in wrong) == (expected == "error"), (line, said)
    assert not revealed
