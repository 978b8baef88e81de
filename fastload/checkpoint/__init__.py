"""Checkpoints in a store: how they are laid out, written down and committed. `records` and what is below need no torch.

A state is a set of named tensors, of which each rank holds pieces. Pieces are packed into segments (`segments`), which
stock readers can open; what lies where is in a record of each rank, and what makes them one checkpoint in its manifest
(`records`). A save is an *attempt* under a prefix of its own, and is nothing until its manifest is there (`commit`).
One process saves and loads a state with the store alone (`single`); several by way of torch.distributed.checkpoint
(`dcp_writer`, `dcp_reader`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.checkpoint.dcp_reader import Reader as Reader
    from fastload.checkpoint.dcp_writer import Writer as Writer
    from fastload.checkpoint.file import create as create
    from fastload.checkpoint.file import open_file as open_file
    from fastload.checkpoint.retention import Keep as Keep
    from fastload.checkpoint.run import Run as Run
    from fastload.checkpoint.single import load as load
    from fastload.checkpoint.single import save as save
    from fastload.checkpoint.single import stream as stream

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "dcp_reader": ["Reader"],
        "dcp_writer": ["Writer"],
        "file": ["create", "open_file"],
        "retention": ["Keep"],
        "run": ["Run"],
        "single": ["load", "save", "stream"],
    },
)
