"""The settings of a run of a loader, as JSON on its command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from bench.data import DataSet

BATCH_SIZE = 256
WORKERS = 2

# A batch as its consumer sees it: key, picture and label of each sample.
Samples = Iterable[tuple[str, bytes | memoryview, bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run reads and where it may cache.

    `processes` are those whose CPU-seconds are taken beside its own, by name.
    """

    system: str
    data_set: DataSet
    bucket: str
    folder: str
    epochs: int = 1
    ram_bytes: int = 2 << 30
    disk_bytes: int = 8 << 30
    starts_at: float = 0.0  # on the monotonic clock, for runs side by side
    ranks: int = 0  # that share one epoch, see `bench.ranks`; 0: the runner reads all of it by itself
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        """The shards in S3."""
        return [f"s3://{self.bucket}/{name}" for name in self.data_set.shards]

    @property
    def pattern(self) -> str:
        """The same as a brace pattern, as one writes it by hand."""
        return f"s3://{self.bucket}/train-{{000000..{len(self.data_set.shards) - 1:06d}}}.tar"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote."""
        fields = json.loads(text)
        data_set = fields.pop("data_set")
        return cls(**fields, data_set=DataSet(**{**data_set, "shards": tuple(data_set["shards"])}))

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))
