"""What can be wrong with a checkpoint."""

from __future__ import annotations

from fastload.errors import FastloadError


class CheckpointError(FastloadError, ValueError):
    """What is stored is not what the format says, or not what was stored; the message names object and place."""


class CheckpointExistsError(FastloadError, FileExistsError):
    """Another writer's checkpoint is there, and stays."""
