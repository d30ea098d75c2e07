"""Hidden neurons of FFNs in any architecture: gated ones, matrices stored as [in, out], an encoder beside a decoder."""

from dataclasses import replace

import pytest
import torch
from ffns import GIVEN, close
from samples import context, drawn, family, merged_of

from merging import Experts
from merging.decompose.ranks import Ranks
from merging.methods import Duet, NeuronMask, Twin
from merging.neurons import Neurons
from merging.statistics import moments

TASKS, WIDE, NARROW = 3, 12, 5
W = torch.tensor([0.7, -1.3, 2.1])
MASK = drawn(TASKS, WIDE, seed=90) > 0.3
UPRIGHT = {"transformer.resblocks.0.mlp.c_fc.weight": (WIDE, NARROW), "transformer.resblocks.0.mlp.c_fc.bias": (WIDE,),
           "transformer.resblocks.0.mlp.c_proj.weight": (NARROW, WIDE), "ln_final.weight": (NARROW,)}  # fmt: skip
GATED = {f"model.layers.0.mlp.{name}_proj.weight": shape for name, shape in
         (("gate", (WIDE, NARROW)), ("up", (WIDE, NARROW)), ("down", (NARROW, WIDE)))}  # fmt: skip
GATED_T5 = {f"{stack}.DenseReluDense.{name}.weight": shape
            for stack in ("encoder.block.0.layer.1", "decoder.block.0.layer.2") for name, shape in
            (("wi_0", (WIDE, NARROW)), ("wi_1", (WIDE, NARROW)), ("wo", (NARROW, WIDE)))}  # fmt: skip
METHODS = {
    "ranks of either side": Duet(ranks=Ranks("absolute", 4, in_value=2)),
    "tucker": Duet(ranks=Ranks("fraction", 0.6)),
    "svd": Duet(ranks=Ranks("fraction", 0.6), factors="svd"),
    "blocks": Duet(ranks=Ranks("fraction", 0.6), unit="block"),
    "masks": NeuronMask(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def named(state):
    """The same numbers as GPT-2 names and stores them."""
    names = {"transformer.resblocks.0": "transformer.h.0", "ln_final": "transformer.ln_f"}
    turned = {}
    for key, tensor in state.items():
        name = key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        turned[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return turned


def merged(method, blocks, base, experts, mask=MASK):
    """With masks by hand."""
    return merged_of(replace(method, neurons=replace(GIVEN, given=dict.fromkeys(blocks, mask))), base, experts)


def weights(result):
    return {key: result.weight(key, W if result.deltas else None) for key in result.specs}


@methods
def test_how_a_matrix_is_stored_changes_nothing(method):
    base, experts = family(TASKS, UPRIGHT)
    upright = merged(method, ["transformer.resblocks.0"], base, experts)
    turned = merged(method, ["transformer.h.0"], named(base), [named(expert) for expert in experts])
    expected, found = named(weights(upright)), weights(turned)
    assert all(close(found[key], expected[key], 2e-5) for key in found)
    for ours, theirs in zip(sorted(upright.fixed), sorted(turned.fixed), strict=True):
        assert close(named(upright.fixed)[theirs], turned.fixed[theirs], 2e-5) and ours != theirs


@pytest.mark.parametrize(("shapes", "blocks"), [
    (GATED, ["model.layers.0"]), (GATED_T5, ["encoder.block.0", "decoder.block.0"]),
])  # fmt: skip
@methods
def test_the_order_of_hidden_neurons_changes_nothing(method, shapes, blocks):
    """Gate and up rows and down columns are one set of neurons: turned together, results turn with them."""
    order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(3))

    def turned(state):
        return {key: tensor[order] if len(tensor) == WIDE else tensor[:, order] if tensor.ndim == 2 else tensor
                for key, tensor in state.items()}  # fmt: skip

    base, experts = family(TASKS, shapes)
    first = merged(method, blocks, base, experts)
    second = merged(method, blocks, turned(base), [turned(expert) for expert in experts], MASK[:, order])
    expected, found = turned(weights(first)), weights(second)
    assert all(close(found[key], expected[key], 2e-5) for key in found)
    if method == NeuronMask():
        assert all((first.shared[key].abs().amax(0 if len(first.shared[key]) == NARROW else 1)[~MASK.any(0)] == 0).all()
                   for key in shapes)  # fmt: skip


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    base, experts = family(TASKS, GATED_T5)
    silent = torch.zeros(TASKS, WIDE, dtype=torch.bool)
    method = NeuronMask(replace(GIVEN, given={"encoder.block.0": ~silent, "decoder.block.0": silent}, scale="none"))
    result = merged_of(method, base, experts)
    for key, change in result.shared.items():
        assert bool(change.any()) == key.startswith("encoder")


def test_a_language_head_that_is_the_embedding_is_routed_with_it_or_not_at_all():
    shapes = {
        "transformer.wte.weight": (9, 4),
        "transformer.h.0.mlp.c_fc.weight": (4, 6),
        "transformer.ln_f.weight": (4,),
    }
    base, experts = family(2, shapes)
    alike = [{**state, "lm_head.weight": state["transformer.wte.weight"]} for state in (base, *experts)]
    apart = [{**state, "lm_head.weight": drawn(9, 4, seed=index)} for index, state in enumerate((base, *experts))]
    for method in (Twin(start=0), Duet("all", static=False)):
        tied = merged_of(method, alike[0], alike[1:])
        assert "lm_head.weight" not in tied.deltas and "transformer.ln_f.weight" in tied.deltas
        state = dict(tied.state(tied.one_hot(0)))
        assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
        assert "lm_head.weight" in merged_of(method, apart[0], apart[1:]).deltas


def test_activity_of_texts_leaves_padding_out():
    pytest.importorskip("transformers")
    from tiny_models import backbone

    for name, matrix in (("RobertaForSequenceClassification", "roberta.encoder.layer.1.output.dense.weight"),
                         ("LlamaForSequenceClassification", "model.layers.1.mlp.down_proj.weight"),
                         ("GPT2ForSequenceClassification", "transformer.h.1.mlp.c_proj.weight")):  # fmt: skip
        model = backbone(name, "first").build()
        ids = torch.tensor([[5, 6, 7, 8], [3, 4, 0, 0]])
        padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        alone = [{"input_ids": row[row != 0][None]} for row in ids]
        one, other = (moments(model, (matrix,), iter(batches)) for batches in ([padded], alone))
        assert one[matrix].shape == (20,) and close(one[matrix], other[matrix], 1e-6)


def test_what_is_measured_of_a_gated_ffn(monkeypatch):
    """At the output of the activation what goes into the second matrix, at its input what the gate gives."""
    asked = []

    def activations(calibration, models, names, *how):
        asked.append((*names, how[-1]))
        return dict.fromkeys(names, MASK)

    monkeypatch.setattr("merging.neurons.activations", activations)
    experts = Experts.open(*family(TASKS, GATED))
    for at in ("output", "input"):
        assert list(Neurons(at=at).measured(experts, context(experts))) == ["model.layers.0"]
    layer = "model.layers.0.mlp."
    assert asked == [(f"{layer}down_proj.weight", "input"), (f"{layer}gate_proj.weight", "output")]
