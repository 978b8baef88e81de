"""The fixtures of the service's tests: a consumer is tested with a real service."""

from __future__ import annotations

from tests.service.conftest import bucket_name, cache, mode, s3, shards

__all__ = ["bucket_name", "cache", "mode", "s3", "shards"]
