"""Gating weights of every token: FFNs take them, what has no tokens of its own refuses them."""

import pytest
import torch
from architectures import BATCH, TOKENS, inputs, model, output
from routes import T, close
from test_routed_architectures import merged_for, weights
from torch.func import functional_call

from merging.errors import UserError
from merging.routing.install import install

FFNS = {  # the modules of a block's FFN
    "open_clip": ("visual.transformer.resblocks.{}.mlp",),
    "ViT": ("layers.{}.mlp",),
    "BERT": ("bert.encoder.layer.{}.intermediate", "bert.encoder.layer.{}.output"),
    "GPT-2": ("transformer.h.{}.mlp",),
    "Llama": ("model.layers.{}.mlp",),
}
W = weights(BATCH, TOKENS, T).float()


def within(path, merged, w):
    """The folded parameters of a submodule."""
    return {key.removeprefix(f"{path}."): value for key, value in merged.state(w) if key.startswith(f"{path}.")}


@pytest.mark.parametrize("name", FFNS)
class TestFeedForward:
    @torch.no_grad()
    def test_every_token_goes_through_its_own_folded_weights(self, name):
        module, kwargs, calls = model(name), inputs(name), {}
        paths = [path.format(block) for block in (0, 1) for path in FFNS[name]]
        merged = merged_for(module, routes=lambda key: key.startswith(tuple(f"{path}." for path in paths)))
        routed = install(module, merged)
        for path in paths:
            note = lambda part, args, answer, path=path: calls.update({path: (args, answer)})  # noqa: E731
            routed.module.get_submodule(path).register_forward_hook(note)
        routed(**kwargs, w=W)
        assert list(calls) == paths
        for path, (args, answer) in calls.items():
            for at in ((0, 0), (1, 3), (3, TOKENS - 1)):
                token = tuple(x[at][None, None] for x in args)
                alone = functional_call(module.get_submodule(path), within(path, merged, W[at]), token)
                close(answer[at], alone[0, 0].double(), 2e-6)

    @torch.no_grad()
    def test_behind_the_last_one_a_token_is_that_of_the_model_with_its_weights(self, name):
        """Nothing mixes tokens there: the whole folded model gives the same."""
        module, kwargs = model(name), inputs(name)
        start = tuple(path.format(1) for path in FFNS[name])
        merged = merged_for(module, routes=lambda key: key.startswith(start))
        answer = output(install(module, merged)(**kwargs, w=W))
        for row, token in ((0, 0), (2, TOKENS - 1)):
            alone = functional_call(module, dict(merged.state(W[row, token])), (), kwargs, tie_weights=True)
            pooled = answer.ndim == 2  # of the class token
            at = (row, 0 if pooled else token)
            if not pooled or token == 0:
                close(answer[row] if pooled else answer[at], (output(alone)[row if pooled else at]).double(), 2e-6)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("open_clip", "class_embedding", "adds tokens of its own, which no w per token"),
        ("open_clip", "positional_embedding", "adds tokens of its own, which no w per token"),
        ("open_clip", "conv1", "conv1 got 4 tokens, but w is for 5: give w per sample"),
        ("CLIPVision", "class_embedding", "adds tokens of its own, which no w per token"),
        ("CLIPVision", "patch_embedding", "patch_embedding got 4 tokens, but w is for 5: give w per sample"),
        ("ViT", "cls_token", "adds tokens of its own, which no w per token"),
        ("ViT", "position_embeddings", "adds tokens of its own, which no w per token"),
        ("T5", "relative_attention_bias", "belongs to pairs of tokens: give w per sample"),
    ],
)
@torch.no_grad()
def test_what_has_no_w_per_token(name, part, message):
    module, kwargs = model(name), inputs(name)
    routed = install(module, merged_for(module, routes=lambda key: part in key))
    routed(**kwargs, w=W[:, 0])
    with pytest.raises(UserError, match=message):
        routed(**kwargs, w=W)
