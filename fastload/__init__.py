"""fastload: a high-throughput data loader for training, with a client-side cache in RAM and on local NVMe.

    import fastload

    dataset = fastload.StreamingDataset("s3://bucket/train-{000000..001023}.tar", shuffle=True, decode={...})
    loader = fastload.DataLoader(dataset, batch_size=256, num_workers=2)

Names are imported when they are first used: the cache service and the command line do without torch.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastload import decode as decode
    from fastload.compat import install as install
    from fastload.compat import uninstall as uninstall
    from fastload.dataset import StreamingDataset as StreamingDataset
    from fastload.errors import (
        AccessDeniedError as AccessDeniedError,
    )
    from fastload.errors import (
        CacheError as CacheError,
    )
    from fastload.errors import (
        ConfigError as ConfigError,
    )
    from fastload.errors import (
        DecodeError as DecodeError,
    )
    from fastload.errors import (
        FastloadError as FastloadError,
    )
    from fastload.errors import (
        MissingColumnError as MissingColumnError,
    )
    from fastload.errors import (
        ObjectChangedError as ObjectChangedError,
    )
    from fastload.errors import (
        ObjectMissingError as ObjectMissingError,
    )
    from fastload.errors import (
        ServiceError as ServiceError,
    )
    from fastload.errors import (
        ShardError as ShardError,
    )
    from fastload.errors import (
        StateError as StateError,
    )
    from fastload.errors import (
        StoreError as StoreError,
    )
    from fastload.errors import (
        StoreUnavailableError as StoreUnavailableError,
    )
    from fastload.errors import (
        WaitTimeoutError as WaitTimeoutError,
    )
    from fastload.errors import (
        WorkerError as WorkerError,
    )
    from fastload.files import open as open  # noqa: A004
    from fastload.loader import DataLoader as DataLoader
    from fastload.mixture import Mixture as Mixture
    from fastload.node import Cache as Cache
    from fastload.ragged import Ragged as Ragged

__version__ = "0.1.0"

_ERRORS = (
    "AccessDeniedError",
    "CacheError",
    "ConfigError",
    "DecodeError",
    "FastloadError",
    "MissingColumnError",
    "ObjectChangedError",
    "ObjectMissingError",
    "ServiceError",
    "ShardError",
    "StateError",
    "StoreError",
    "StoreUnavailableError",
    "WaitTimeoutError",
    "WorkerError",
)

_HOMES = {
    "Cache": "fastload.node",
    "DataLoader": "fastload.loader",
    "Mixture": "fastload.mixture",
    "Ragged": "fastload.ragged",
    "StreamingDataset": "fastload.dataset",
    "install": "fastload.compat",
    "open": "fastload.files.opening",
    "uninstall": "fastload.compat",
    **dict.fromkeys(_ERRORS, "fastload.errors"),
}

_NAMES = ("Cache", "DataLoader", "Mixture", "Ragged", "StreamingDataset", "decode", "install", "open", "uninstall")

__all__ = [*_NAMES, *_ERRORS]


def __getattr__(name: str) -> Any:
    if name == "decode":
        return _imported("fastload.decode")
    if name not in _HOMES:
        # Named, so that Python can say what was meant.
        raise AttributeError(f"module 'fastload' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(_imported(_HOMES[name]), name)
    globals()[name] = value
    return value


def _imported(name: str) -> Any:
    """A module. Beside torch, one collection of garbage takes 80 ms, half of what importing all of fastload does, and
    nothing that is imported is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
