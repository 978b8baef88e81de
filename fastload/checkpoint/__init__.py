"""Checkpoints in a store: how they are laid out, written down and committed. Nothing here needs torch.

A state is a set of named tensors, of which each rank holds pieces. Pieces are packed into segments (`segments`), which
stock readers can open; what lies where is in a record of each rank, and what makes them one checkpoint in its manifest
(`records`). A save is an *attempt* under a prefix of its own, and is nothing until its manifest is there (`commit`).
"""
