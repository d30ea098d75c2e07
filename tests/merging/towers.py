"""CLIPs of one shape in Hugging Face's and in open_clip's own classes."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from samples import drawn

from merging.backbones.open_clip import ImageTower


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    patch: int
    image: int
    text_width: int
    text_layers: int
    text_heads: int
    shared: int  # dimension of the features
    vocabulary: int = 19
    context: int = 7

    @property
    def vision(self):
        """What open_clip calls vision_cfg."""
        sides = {"patch_size": self.patch, "image_size": self.image}
        return {"layers": self.layers, "width": self.width, "head_width": self.width // self.heads, **sides}

    def images(self, count=4):
        return drawn(count, 3, self.image, self.image)


SIZES = {
    "small": Shape(24, 2, 3, 8, 16, 16, 1, 2, 12),
    "deep": Shape(16, 3, 2, 4, 16, 24, 2, 3, 20),
    "eleven blocks": Shape(8, 11, 1, 8, 8, 8, 1, 1, 8),
}
PUBLISHED = {
    "B/32": Shape(768, 12, 12, 32, 224, 512, 12, 8, 512, 49408, 77),
    "B/16": Shape(768, 12, 12, 16, 224, 512, 12, 8, 512, 49408, 77),
    "L/14": Shape(1024, 24, 16, 14, 224, 768, 12, 12, 768, 49408, 77),
}


def hugging_face(shape, whole=True):
    """A CLIPModel, or a CLIPVisionModel alone."""
    transformers = pytest.importorskip("transformers")
    common = {"projection_dim": shape.shared, "hidden_act": "quick_gelu"}
    vision = common | {
        "hidden_size": shape.width, "intermediate_size": 4 * shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "patch_size": shape.patch, "image_size": shape.image,
    }  # fmt: skip
    if not whole:
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).eval()
    text = common | {
        "hidden_size": shape.text_width, "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers, "num_attention_heads": shape.text_heads,
        "vocab_size": shape.vocabulary, "max_position_embeddings": shape.context, "eos_token_id": shape.vocabulary - 1,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.shared)
    return transformers.CLIPModel(config).eval()


def open_clip(shape):
    from open_clip.model import CLIP

    text = {"context_length": shape.context, "vocab_size": shape.vocabulary, "width": shape.text_width}
    text |= {"heads": shape.text_heads, "layers": shape.text_layers}
    return CLIP(shape.shared, shape.vision, text, quick_gelu=True).eval()


def tower_of(shape):
    """Our own, with random weights."""
    return ImageTower(shape.shared, shape.vision, quick_gelu=True).eval()


def scrambled(model):
    """No parameter zero or one, so that one that is left out or confused is seen."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * drawn(*parameter.shape, seed=index) + 0.1
    return model


@cache
def whole(size):
    """One CLIPModel of each size for all tests: do not write into it."""
    return scrambled(hugging_face(SIZES[size]))


def pooled(output):
    """The features, which some versions of transformers wrap."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def state(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.specs()}
