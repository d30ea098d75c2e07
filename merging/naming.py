"""What a parameter is, read off its name."""

import re
from dataclasses import dataclass

KINDS = ("norm", "ffn", "attention", "other")


@dataclass(frozen=True)
class Naming:
    """Patterns searched in a parameter's name; the defaults cover open_clip and Hugging Face (even `layrnorm`)."""

    ffn: str = r"\bmlp\b|\.fc[12]\.|\bc_fc\b|\bc_proj\b|intermediate\.|(?<!attention\.)output\.dense"
    attention: str = r"\battn\b|attention|[qkv]_proj|in_proj|out_proj"
    norm: str = r"\bln_|laye?r_?norm|\bnorm\d?\b|LayerNorm"
    down: str = r"\bc_proj\b|\bfc2\b|(?<!attention\.)output\.dense"  # the second linear layer of an FFN
    tail: str = r"\bln_post\b|post_layernorm|(?<!\w)proj$|visual_projection"
    block: str = r"(?:resblocks|layers?|blocks|h)\.(\d+)\."

    def kind(self, key: str) -> str:
        """ffn | attention | norm | other; norms first, because they sit beside attention in many names."""
        return next((kind for kind in KINDS[:-1] if re.search(getattr(self, kind), key)), KINDS[-1])

    def hidden(self, key: str) -> int | None:
        """The axis of an FFN parameter [out, ...] along which hidden neurons lie, None where they do not."""
        if self.kind(key) != "ffn":
            return None
        if re.search(self.down, key):
            return 1 if key.endswith("weight") else None
        return 0

    def after(self, key: str) -> bool:
        """Whether a parameter outside the blocks lies behind them: the last norm and the projection."""
        return bool(re.search(self.tail, key))

    def depth(self, key: str) -> int | None:
        """Index of the transformer block, None outside the blocks."""
        match = re.search(self.block, key)
        return int(match[1]) if match else None
