"""What a parameter is, looked up by its name in a table. There is one, CLIP's: open_clip's names and Hugging Face's."""

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from merging.errors import UserError

KINDS = ("norm", "ffn", "attention", "other")
BLOCK = r"(?:(?:visual\.)?transformer\.resblocks|(?:(?:vision|text)_model\.)?encoder\.layers)\.(\d+)\."
PAIR = r"(?:weight|bias)"


class Parameter(NamedTuple):
    """kind: one of KINDS. depth: index of its block. hidden: axis of hidden neurons. after: behind the blocks."""

    kind: str
    depth: int | None = None
    hidden: int | None = None
    after: bool = False


INSIDE = {  # of a block
    rf"(?:ln_|layer_norm)[12]\.{PAIR}": Parameter("norm"),
    rf"attn\.(?:in|[qkv])_proj_{PAIR}|attn\.out_proj\.{PAIR}": Parameter("attention"),
    rf"self_attn\.(?:[qkv]|out)_proj\.{PAIR}": Parameter("attention"),
    rf"mlp\.(?:c_fc|fc1)\.{PAIR}": Parameter("ffn", hidden=0),
    r"mlp\.(?:c_proj|fc2)\.weight": Parameter("ffn", hidden=1),
    r"mlp\.(?:c_proj|fc2)\.bias": Parameter("ffn"),
    r"ls_[12]\.gamma": Parameter("other"),
}
OUTSIDE = {
    rf"(?:visual\.)?ln_pre\.{PAIR}|(?:vision_model\.)?pre_layrnorm\.{PAIR}": Parameter("norm"),  # HF's misspelling
    rf"(?:visual\.)?ln_post\.{PAIR}|(?:vision_model\.)?post_layernorm\.{PAIR}": Parameter("norm", after=True),
    rf"ln_final\.{PAIR}|(?:text_model\.)?final_layer_norm\.{PAIR}": Parameter("norm", after=True),
    r"(?:visual\.)?proj|visual_projection\.weight|text_projection(?:\.weight)?": Parameter("other", after=True),
    r"(?:visual\.)?(?:conv1\.weight|class_embedding|positional_embedding)": Parameter("other"),
    r"token_embedding\.weight|logit_(?:scale|bias)": Parameter("other"),
    r"(?:(?:vision|text)_model\.)?embeddings\.(?:class_embedding|(?:patch|position|token)_embedding\.weight)":
        Parameter("other"),
}  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """The table of CLIP. All raise UserError for a name that it does not have: nothing is guessed."""

    def kind(self, key: str) -> str:
        """ffn | attention | norm | other."""
        return looked_up(key).kind

    def hidden(self, key: str) -> int | None:
        """The axis of an FFN parameter [out, ...] along which hidden neurons lie, None where they do not."""
        return looked_up(key).hidden

    def after(self, key: str) -> bool:
        """Whether a parameter outside the blocks lies behind them: the last norm and the projection."""
        return looked_up(key).after

    def depth(self, key: str) -> int | None:
        """Index of the transformer block, None outside the blocks."""
        return looked_up(key).depth


@cache
def looked_up(key: str) -> Parameter:
    """What the table says of a name. Raises UserError where it says nothing."""
    block = re.match(BLOCK, key)
    rest, table = (key[block.end() :], INSIDE) if block else (key, OUTSIDE)
    for pattern, parameter in table.items():
        if re.fullmatch(pattern, rest):
            return parameter._replace(depth=int(block[1])) if block else parameter
    raise UserError(
        f"{key} is not in the table CLIP (the names of open_clip and Hugging Face), so that its kind, block and hidden "
        f"neurons are not known. Give checkpoints of a CLIP, or choose a method that does not ask for them: average, "
        f"task_arithmetic, ties, dare, tsv_m, iso_c, iso_cts, emr, tall_mask, or twin with start=null."
    )
