"""One image file to the pixels that CLIP sees."""

import warnings
from io import BytesIO
from typing import Any, NamedTuple

import numpy

from tasks.vision.tables import Encoded


class Damaged(NamedTuple):
    """An image that cannot be read, and why."""

    where: str
    why: str


def decode(encoded: Encoded, size: int) -> numpy.ndarray | Damaged:
    """uint8 [3, size, size]: CLIP's evaluation transform up to, not including, the scaling to [0, 1].

    Short side to `size` by PIL's bicubic filter, centre crop, then RGB, as open_clip.image_transform does it; the
    orientation in EXIF is ignored, as torchvision and Hugging Face ignore it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = encoded.content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palettes with transparency, large but readable images
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                image.load()
                pixels = numpy.asarray(shaped(image, size).convert("RGB"))
    except UnidentifiedImageError:
        return Damaged(encoded.where, "it is empty or of no known image format")
    except Exception as error:  # PIL raises whatever its parsers stumble over
        return Damaged(encoded.where, f"{type(error).__name__}: {error}")
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1))


def shaped(image: Any, size: int) -> Any:
    """A PIL image resized and cropped to size x size, in its own mode."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    return center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size, size])
