"""What a user declares for a column: `decode={"jpg": decode.image(size=224), "cls": decode.integer()}`."""

from fastload.decode.base import Decoder
from fastload.decode.npy import array
from fastload.decode.pictures import image
from fastload.decode.plain import integer, json, number, raw, text

__all__ = ["Decoder", "array", "image", "integer", "json", "number", "raw", "text"]
