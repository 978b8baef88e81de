"""fastload: a high-throughput data loader for training, with a client-side cache in RAM and on local NVMe.

    import fastload

    dataset = fastload.StreamingDataset("s3://bucket/train-{000000..001023}.tar", shuffle=True, decode={...})
    loader = fastload.DataLoader(dataset, batch_size=256, num_workers=2)

Names are imported when they are first used: the cache service and the command line do without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload import errors
from fastload.lazy import lazy_names
from fastload.version import __version__ as __version__

if TYPE_CHECKING:
    from fastload import decode as decode
    from fastload import formats as formats
    from fastload import metrics as metrics
    from fastload.client.cache import Cache as Cache
    from fastload.compat import install as install
    from fastload.compat import uninstall as uninstall
    from fastload.data_schema import schema as schema
    from fastload.dataset import StreamingDataset as StreamingDataset
    from fastload.errors import *  # noqa: F403  # all of them are public
    from fastload.files import open as open  # noqa: A004
    from fastload.loader import DataLoader as DataLoader
    from fastload.mixture import Mixture as Mixture
    from fastload.ragged import Ragged as Ragged
    from fastload.warmup import warm as warm

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "compat": ["install", "uninstall"],
        "data_schema": ["schema"],
        "dataset": ["StreamingDataset"],
        "decode": [],
        "formats": [],
        "metrics": [],
        "errors": errors.__all__,
        "files.file": ["open"],
        "loader": ["DataLoader"],
        "mixture": ["Mixture"],
        "client.cache": ["Cache"],
        "ragged": ["Ragged"],
        "warmup": ["warm"],
    },
)
