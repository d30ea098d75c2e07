"""Grey images of more than 8 bits keep their range, or are refused where nobody knows it."""

import struct

import numpy
import pytest
from PIL import Image
from test_images import encoded

from tasks.vision.decode import Damaged, Encoded, decode

GREY = numpy.arange(64, dtype=numpy.uint8).reshape(8, 8) * 4  # 0, 4, ..., 252


def tiff(samples, bits, signed=False, photometric=1):
    """A TIFF of one grey strip, by hand: PIL writes neither 12 bits nor white as zero."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 8, 279: len(samples),
            339: 2 if signed else 1}  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = struct.pack("<H", len(tags)) + directory + bytes(4)
    return Encoded("a.tif", b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + end)


def packed(values):
    """12 bits each, as TIFF has them."""
    pairs = values.reshape(-1, 2)
    return bytes(byte for a, b in pairs.tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))


WIDE = GREY.astype(numpy.uint16) * 257  # exactly the same greys
WIDER = {
    "png 16 bit": lambda: encoded(Image.fromarray(WIDE), "PNG"),
    "png 16 bit, rounded": lambda: encoded(Image.fromarray((WIDE + 100 * (WIDE < 65000)).astype(numpy.uint16)), "PNG"),
    "tiff 16 bit": lambda: encoded(Image.fromarray(WIDE), "TIFF"),
    "tiff 16 bit, big-endian": lambda: encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"),
    "tiff 16 bit, white is zero": lambda: tiff((65535 - WIDE).tobytes(), 16, photometric=0),
    "tiff 12 bit": lambda: tiff(packed((GREY.astype(float) * 4095 / 255).round().astype(int)), 12),
    "tiff 32 bit": lambda: encoded(Image.fromarray(WIDE.astype(numpy.int32)), "TIFF"),
    "pgm 16 bit": lambda: Encoded("a.pgm", b"P5 8 8 65535\n" + WIDE.astype(">u2").tobytes()),
    "pgm 10 bit": lambda: Encoded("a.pgm", b"P5 8 8 1020\n" + (4 * GREY.astype(int)).astype(">u2").tobytes()),
    "pgm 16 bit, dark": lambda: Encoded("a.pgm", b"P5 8 8 65535\n" + (WIDE // 257).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("case", WIDER)
def test_more_than_eight_bits_keep_their_range(case):
    found = decode(WIDER[case](), 8)
    want = GREY // 129 if case.endswith("dark") else GREY
    assert isinstance(found, numpy.ndarray) and all(numpy.array_equal(channel, want) for channel in found)
    small, large = decode(WIDER[case](), 5), decode(encoded(Image.fromarray(want), "PNG"), 5)
    assert numpy.array_equal(small, large)  # resized as an image of 8 bits is


@pytest.mark.parametrize(("image", "why"), [
    (encoded(Image.fromarray(GREY.astype(numpy.float32) / 255), "TIFF"), "floating-point numbers"),
    (encoded(Image.fromarray(GREY.astype(numpy.int32)), "TIFF"), "32 bits from 0 to 252, of which range is not said"),
    (encoded(Image.fromarray(GREY.astype(numpy.int32) * 70000), "TIFF"), "32 bits from 0 to 17640000"),
    (tiff((WIDE.astype(numpy.int32) - 1000).astype(numpy.int16).tobytes(), 16, signed=True), "32 bits from -"),
])  # fmt: skip
def test_images_of_an_unknown_range_are_refused(image, why):
    found = decode(image, 8)
    assert isinstance(found, Damaged) and found.where == image.where and why in found.why
