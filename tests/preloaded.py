"""What processes of the tests' fork server (`conftest`) have imported from the start, which would take each of them
seconds: all of fastload, and what torch and numba import as they are first used.
"""

from __future__ import annotations

import hypothesis
import llvmlite.binding
import numpy.ma
import pytest
import torch._dynamo
import torch.distributed

import fastload
import fastload.formats.tar
import tests.jobs.reading
import tests.jobs.training
import tests.shards
import tests.zygote

__all__ = ["fastload", "hypothesis", "llvmlite", "numpy", "pytest", "tests", "torch"]

for _name in fastload.__all__:
    getattr(fastload, _name)  # each is imported when it is first used

tests.zygote.install()
