"""The one place where the golden files' modules import from inside fastload: what moves is renamed here."""

from fastload import protocol
from fastload.cache import ChunkKey, object_id
from fastload.cache.blobfile import read as read_blob
from fastload.cache.blobfile import write as write_blob
from fastload.cache.chunkfile import read_into as read_chunk
from fastload.cache.chunkfile import write as write_chunk
from fastload.cli import app as command_line
from fastload.dataset import IndexedDataset
from fastload.formats import ShardIndex, indexer_for
from fastload.formats.sidecar import SidecarWriter
from fastload.formats.sidecar import read_summary as read_sidecar
from fastload.history.archive import Archive
from fastload.history.keys import object_key
from fastload.history.record import Recorder
from fastload.history.runfile import EndpointSummary
from fastload.plan import Manifest, Position
from fastload.store.table import ObjectRows
from fastload.store.types import ObjectInfo

__all__ = [
    "Archive",
    "ChunkKey",
    "EndpointSummary",
    "IndexedDataset",
    "Manifest",
    "ObjectInfo",
    "ObjectRows",
    "Position",
    "Recorder",
    "ShardIndex",
    "SidecarWriter",
    "command_line",
    "indexer_for",
    "object_id",
    "object_key",
    "protocol",
    "read_blob",
    "read_chunk",
    "read_sidecar",
    "write_blob",
    "write_chunk",
]
