"""The server that the tests stand on."""

from __future__ import annotations

import obstore
from obstore.store import S3Store

from fastload.demo.weed import WeedServer
from tests.conftest import Bucket


def test_takes_and_gives_objects(weed: WeedServer, s3: Bucket) -> None:
    url = s3.put("folder/a.bin", b"hello")
    assert url == f"{s3.url}/folder/a.bin"
    store = S3Store(
        s3.name,
        endpoint=weed.endpoint_url,
        access_key_id=weed.access_key_id,
        secret_access_key=weed.secret_access_key,
        client_options={"allow_http": True, "pool_max_idle_per_host": "0"},
    )
    assert bytes(obstore.get(store, "folder/a.bin").bytes()) == b"hello"
    s3.delete("folder/a.bin")
    assert obstore.list(store).collect() == []


def test_each_test_has_a_bucket_of_its_own(s3: Bucket) -> None:
    assert s3.options.endpoint_url == s3.server.endpoint_url
    assert str(s3.options.secret_access_key) not in repr(s3.options)
