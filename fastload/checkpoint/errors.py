"""What can be wrong with a checkpoint."""

from __future__ import annotations

from fastload.errors import FastloadError


class CheckpointError(FastloadError, ValueError):
    """A checkpoint lacks what was asked for, does not fit it, or is damaged; the message names object and place."""


class CheckpointDamagedError(CheckpointError):
    """What is stored is torn, was changed, or lacks a part: another step may be whole."""


class CheckpointExistsError(FastloadError, FileExistsError):
    """Another writer's checkpoint is there, and stays."""
