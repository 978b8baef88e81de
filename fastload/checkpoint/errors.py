"""What can be wrong with a checkpoint: see `fastload.errors`."""

from fastload.errors import CheckpointDamagedError as CheckpointDamagedError
from fastload.errors import CheckpointError as CheckpointError
from fastload.errors import CheckpointExistsError as CheckpointExistsError
