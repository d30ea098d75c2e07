"""One image file to the pixels that CLIP sees."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
SCALED = ("PPM", "PNG")  # formats whose 32-bit integers are 16 bits by definition


class Encoded(NamedTuple):
    """One image file. `where` names it in messages."""

    where: str
    content: bytes | Path


class Damaged(NamedTuple):
    """An image that cannot be read, and why."""

    where: str
    why: str


class UnknownRange(ValueError):
    """Pixels of which nobody knows what is white."""


def decode(encoded: Encoded, size: int) -> numpy.ndarray | Damaged:
    """uint8 [3, size, size]: CLIP's evaluation transform up to, not including, the scaling to [0, 1].

    Short side to `size` by PIL's bicubic filter, centre crop, then RGB, as open_clip.image_transform does it; the
    orientation in EXIF is ignored, as torchvision and Hugging Face ignore it. Grey images of more than 8 bits keep
    their range, where open_clip clips them.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = encoded.content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palettes with transparency, large but readable images
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                image.load()
                pixels = numpy.asarray(shaped(eight_bit(image), size).convert("RGB"))
    except UnidentifiedImageError:
        return Damaged(encoded.where, "it is empty or of no known image format")
    except UnknownRange as error:
        return Damaged(encoded.where, str(error))
    except Exception as error:  # PIL raises whatever its parsers stumble over
        return Damaged(encoded.where, f"{type(error).__name__}: {error}")
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1))


def eight_bit(image: Any) -> Any:
    """A loaded PIL image, those of more than 8 bits as mode L: black stays black, the highest value becomes 255.

    Raises UnknownRange for floats, and for 32-bit integers that are not plainly of 16 bits.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    from PIL import Image

    if image.mode == "F":
        raise UnknownRange("its pixels are floating-point numbers, of which range is not said; save it with 8 bits")
    values, tags = numpy.asarray(image).astype(numpy.float64), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "I" and image.format not in SCALED and (low < 0 or high > 65535 or 0 < high < 256):
        raise UnknownRange(
            f"its pixels are integers of 32 bits from {low:.0f} to {high:.0f}, of which range is not said; save it "
            f"with 8 or 16 bits"
        )
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0] if image.mode != "I" else 16
    grey = (values * 255 / (2**bits - 1)).round().astype(numpy.uint8)
    inverted = image.mode != "I" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO  # which PIL heeds in 8 bits only
    return Image.fromarray(255 - grey if inverted else grey)


def shaped(image: Any, size: int) -> Any:
    """A PIL image resized and cropped to size x size, in its own mode."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    return center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size, size])
