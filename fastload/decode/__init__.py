"""What a user declares for a column: `decode={"jpg": decode.image(size=224), "cls": decode.integer()}`."""

from fastload.decode.base import Decoder
from fastload.decode.flat import flat
from fastload.decode.npy import array
from fastload.decode.pictures import image
from fastload.decode.plain import integer, json, number, raw, text

__all__ = ["Decoder", "array", "flat", "image", "integer", "json", "number", "raw", "text"]
