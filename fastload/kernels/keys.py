"""The keys of samples (see `fastload.decode.base`): what splitmix64 makes of a run, an object and a sample in turn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.jit import array_in, array_out, int64, kernel, uint64, void
from fastload.kernels.splitmix import splitmix

__all__ = ["fill_keys"]

_ONE = np.uint64(1)


@kernel(void(array_in(uint64), array_in(int64), array_in(int64), array_out(uint64)))
def fill_keys(
    run: NDArray[np.uint64], object_no: NDArray[np.int64], sample_no: NDArray[np.int64], keys: NDArray[np.uint64]
) -> None:
    """Write the key of sample `sample_no[i]` of object `object_no[i]` to `keys[i]`; `run` has one word."""
    for i in range(object_no.size):
        of_object = splitmix(run[0], np.uint64(object_no[i]) + _ONE)
        keys[i] = splitmix(of_object, np.uint64(sample_no[i]) + _ONE)
