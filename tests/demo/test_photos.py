"""The demo's data set: real photographs, always the same."""

from __future__ import annotations

import tarfile
from pathlib import Path

import simplejpeg

from fastload.demo import photos


def test_shards_hold_every_sample_and_are_always_the_same(tmp_path: Path) -> None:
    first = photos.write_shards(tmp_path / "a", count=10, shards=4)
    again = photos.write_shards(tmp_path / "b", count=10, shards=4)
    assert [path.name for path in first] == [f"photos-{number:06d}.tar" for number in range(4)]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    names = []
    for path in first:
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert names == [f"{number:06d}.{column}" for number in range(10) for column in ("cls", "jpg")]


def test_a_sample_is_a_crop_of_the_photograph_that_its_label_names() -> None:
    pictures = photos.photographs()
    assert len(pictures) == photos.LABEL_COUNT
    crop = photos.Crop(label=len(pictures) - 1, top=3, left=5, mirrored=False)
    (sample,) = photos.samples(pictures, [crop], quality=100)
    decoded = simplejpeg.decode_jpeg(sample["jpg"]).astype(int)
    original = pictures[-1][3 : 3 + photos.HEIGHT, 5 : 5 + photos.WIDTH]
    assert abs(decoded - original).mean() < 3
    assert sample["cls"] == b"15"
