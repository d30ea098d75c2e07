"""Any module with a merge inside against torch's functional call with the weights of one sample folded."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from architectures import BATCH, DECODERS, LANGUAGE, TOKENS, VARIANTS, WIDTH, inputs, model, output
from routes import T, close, delta
from torch import nn
from torch.func import functional_call

from merging.checkpoints import StateDict
from merging.errors import UserError
from merging.merged import Merged, Routing
from merging.routing.gates import Gate, GateShape, listening
from merging.routing.install import install

KINDS = ("Dense", "LowRank", "Tucker", "Masked")


def merged_for(module, kinds=KINDS, routes=lambda key: True, routing=None):
    """Deltas of all kinds in turn on the parameters; a tied one has its delta under one name."""
    base = StateDict({key: value.detach() for key, value in module.named_parameters()})
    keys = [key for key in base.specs() if routes(key)]
    deltas = {key: delta(kinds[i % len(kinds)], base.specs()[key].shape, i) for i, key in enumerate(keys)}
    return Merged(base, tuple("abc"), base.specs(), deltas=deltas, routing=routing)


def weights(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def folded(module, merged, w, kwargs):
    """The module's own output for one sample."""
    return output(functional_call(module, dict(merged.state(w)), (), kwargs, tie_weights=True))


def row(kwargs, index):
    return {name: value[index : index + 1] for name, value in kwargs.items()}


def as_double(module, merged):
    """fp64 twins of a module and a merge."""
    base = StateDict({key: merged.base.tensor(key).double() for key in merged.specs})
    return copy.deepcopy(module).double(), replace(merged, base=base)


@pytest.mark.parametrize("name", VARIANTS)
class TestEveryArchitecture:
    @torch.no_grad()
    def test_equals_the_folded_weights_of_every_sample(self, name):
        module, kwargs = model(name), inputs(name)
        merged = merged_for(module)
        routed, w = install(module, merged), weights(BATCH, T).float()
        found = output(routed(**kwargs, w=w))
        expected = torch.cat([folded(module, merged, w[i], row(kwargs, i)) for i in range(BATCH)])
        close(found, expected.double(), 2e-6)
        other = folded(module, merged, w[1], row(kwargs, 0))
        assert float((other - expected[:1]).norm() / other.norm()) > 1e-2

    @torch.no_grad()
    def test_equals_the_folded_weights_of_one_w(self, name):
        module, kwargs = model(name), inputs(name)
        merged, w = merged_for(module), weights(T).float()
        for kernel in ("auto", "factored"):
            found = output(install(module, merged).use(kernel)(**kwargs, w=w))
            close(found, folded(module, merged, w, kwargs).double(), 2e-6)

    @torch.no_grad()
    def test_a_w_per_token_that_is_alike_is_one_per_sample(self, name):
        module, kwargs = model(name), inputs(name)
        stem = ("class_emb", "position", "conv1", "patch_embed", "cls_token", "relative_attention", "pooler")
        merged = merged_for(module, routes=lambda key: not any(part in key for part in stem))
        routed, w = install(module, merged), weights(BATCH, T).float()
        kwargs = kwargs | ({"decoder_input_ids": kwargs["input_ids"].flip(1)} if "decoder_input_ids" in kwargs else {})
        per_token = w[:, None].expand(-1, TOKENS, -1)
        close(output(routed(**kwargs, w=per_token)), output(routed(**kwargs, w=w)).double(), 2e-6)

    @torch.no_grad()
    def test_the_module_given_is_left_as_it_is(self, name):
        module, kwargs = model(name), inputs(name)
        kinds, before = [type(child) for child in module.modules()], output(module(**kwargs))
        routed = install(module, merged_for(module))
        routed(**kwargs, w=torch.ones(T))
        assert [type(child) for child in module.modules()] == kinds
        assert torch.equal(output(module(**kwargs)), before)


@pytest.mark.parametrize("name", ["open_clip", "CLIPVision", "ViT", "RoBERTa", "T5", "Gemma"])
class TestModes:
    @torch.no_grad()
    def test_threads_and_copies_have_weights_of_their_own(self, name):
        module, kwargs = model(name), inputs(name)
        routed = install(module, merged_for(module))
        ws = [weights(BATCH, T, seed=seed).float() for seed in range(8)]
        alone = [output(routed(**kwargs, w=w)) for w in ws]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda w: output(routed(**kwargs, w=w)), ws))
        assert all(map(torch.equal, alone, together))
        twin = copy.deepcopy(routed)
        routed(**kwargs, w=ws[1])
        assert torch.equal(output(twin(**kwargs, w=ws[0])), alone[0])

    def test_gradients_to_w(self, name):
        if name == "Gemma":
            pytest.skip("of padded rows it makes NaN in fp64, without a merge too")
        module, kwargs = as_double(model(name), merged_for(model(name)))[0], inputs(name)
        kwargs = {key: value.double() if value.is_floating_point() else value for key, value in kwargs.items()}
        merged = as_double(model(name), merged_for(model(name)))[1]
        routed = install(module, merged).double()
        w = weights(BATCH, T).requires_grad_()
        output(routed(**kwargs, w=w)).square().sum().backward()
        step = torch.zeros(BATCH, T, dtype=torch.float64)
        step[:2, 2] = 1e-3
        with torch.no_grad():
            ends = [output(routed(**kwargs, w=w + s)).square().sum() for s in (step, -step)]
        assert float(ends[0] - ends[1]) / 2e-3 == pytest.approx(float(w.grad[:2, 2].sum()), rel=1e-3)

    def test_autocast_and_inference_mode(self, name):
        module, kwargs = model(name), inputs(name)
        routed, w = install(module, merged_for(module)), weights(BATCH, T).float()
        expected = output(routed(**kwargs, w=w)).detach()
        with torch.inference_mode():
            assert torch.equal(output(routed(**kwargs, w=w)), expected)
            with torch.autocast("cpu", torch.bfloat16):
                found = output(routed(**kwargs, w=w)).float()
        assert 1e-6 < float((found - expected).norm() / expected.norm()) < 0.15


def gated(name, sees, routes=lambda key: True, **shape):
    """A routed model with gates that tell samples apart, and its merge."""
    shape = GateShape(sees=sees, activation="none", **shape)
    module = model(name)
    bare = install(module, merged_for(module, routes=routes))
    count = sum(block.routed for block in bare.blocks) if sees == "block" else 1
    torch.manual_seed(5)
    gates = nn.ModuleList([Gate(WIDTH, T, shape).eval().requires_grad_(False) for _ in range(count)])
    for gate in gates:
        nn.init.normal_(gate.net[-1].weight, std=0.5)
    merged = merged_for(module, routes=routes, routing=Routing("learned", gate=shape, gates=gates))
    return install(module, merged), merged


@pytest.mark.parametrize("sees", ["block", "early", "pass"])
@pytest.mark.parametrize("name", ["CLIPVision with projection", "ViT", "RoBERTa classifier", "GPT-2", "Llama"])
@torch.no_grad()
def test_gates_answer_for_a_sample_alone_and_leave_padding_out(name, sees):
    routed, _ = gated(name, sees, lambda key: "layer" in key or ".h." in key)
    kwargs = inputs(name)
    with listening() as heard:
        found = output(routed(**kwargs))
    assert len(heard) == (2 if sees == "block" else 1) and float(torch.stack(heard).std(1).max()) > 0.01
    for index in range(BATCH):
        alone = row(kwargs, index)
        if "attention_mask" in alone and name not in ("GPT-2",):  # whose positions count padding
            kept = alone["attention_mask"][0].bool()
            alone = {key: value[:, kept] for key, value in alone.items()}
        with listening() as own:
            answer = output(routed(**alone))
        for together, single in zip(heard, own, strict=True):
            close(single[0], together[index].double(), 1e-4)
        close(answer[:, -1:], found[index : index + 1, -1:].double(), 1e-4) if answer.ndim == 2 or name in (
            "GPT-2",
            "Llama",
        ) else None


@pytest.mark.parametrize("name", DECODERS)
class TestDecoders:
    @pytest.mark.parametrize("beams", [1, 3])
    def test_given_w_generates_what_the_folded_model_does(self, name, beams):
        module = model(name)
        merged, w = merged_for(module), weights(BATCH, T).float()
        prompt = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
        options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "min_new_tokens": 5}
        found = install(module, merged).generate(**prompt, w=w, **options)
        for index in range(BATCH):
            plain = copy.deepcopy(module)
            plain.load_state_dict(dict(merged.state(w[index])), strict=False)
            plain.tie_weights()
            alone = row(prompt, index)
            kept = alone["attention_mask"][0].bool() if name != "GPT-2" else slice(None)
            expected = plain.generate(**{key: value[:, kept] for key, value in alone.items()}, **options)
            assert torch.equal(found[index, -5:], expected[0, -5:])

    @pytest.mark.parametrize("sees", ["block", "early", "pass"])
    def test_gates_are_asked_once_for_a_prompt(self, name, sees):
        if name == "T5" and sees == "block":
            with pytest.raises(UserError, match="has an encoder and a decoder"):
                gated(name, sees)
            return
        routed, _ = gated(name, sees, lambda key: "layer" in key or ".h." in key or "block" in key)
        prompt = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
        with listening() as heard:
            found = routed.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert len(heard) == (2 if sees == "block" else 1)
        if sees != "block":
            given = routed.generate(**prompt, w=heard[0], max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert torch.equal(found, given)


class TestBadInput:
    def test_a_gate_on_a_model_without_blocks(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        shape = GateShape()
        routing = Routing("learned", gate=shape, gates=nn.ModuleList([Gate(4, T, shape)]))
        with pytest.raises(UserError, match="Sequential has no repeated blocks"):
            install(module, merged_for(module, routing=routing))

    def test_a_module_that_was_replaced_afterwards(self):
        module = model("open_clip")
        routed = install(module, merged_for(module))
        blocks = routed.module.visual.transformer.resblocks
        blocks[1].mlp.c_fc = nn.Linear(24, 96)
        with pytest.raises(UserError, match="c_fc of Sequential was replaced after"):
            routed(**inputs("open_clip"), w=torch.ones(T))
        routed = install(module, merged_for(module))
        routed.module.visual.transformer.resblocks[0] = blocks[0]
        with pytest.raises(UserError, match="0 of ModuleList was replaced after"):
            routed(**inputs("open_clip"), w=torch.ones(T))

    def test_an_owner_that_nothing_is_written_for(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
        with pytest.raises(UserError, match=r"1 is a GroupNorm, whose weight cannot be mixed"):
            install(module, merged_for(module, routes=lambda key: key == "1.weight"))

    def test_a_weight_that_is_read_past_its_module(self):
        module = model("CLIPVision")
        routed = install(module, merged_for(module, routes=lambda key: "position_embedding" in key))
        routed(**inputs("CLIPVision"), w=torch.eye(T)[[0] * BATCH])
        with pytest.raises(UserError, match="reads the weight of a routed module"):
            routed(torch.zeros(BATCH, 3, 32, 32), interpolate_pos_encoding=True, w=torch.eye(T)[[0] * BATCH])

    def test_a_parameter_that_the_merge_lacks(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        merged = merged_for(module)
        specs = {key: spec for key, spec in merged.specs.items() if key != "1.bias"}
        with pytest.raises(UserError, match=r"has the parameter 1.bias, which the merge has not"):
            install(module, replace(merged, specs=specs, deltas={}))

    def test_rows_that_are_not_samples(self):
        """Experts of a mixture see tokens of all samples in one axis."""

        class Flattening(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                return self.linear(x.flatten(0, 1))

        routed = install(Flattening(), merged_for(Flattening()))
        with pytest.raises(UserError, match=r"linear got 6 rows, but w is for 2"):
            routed(torch.zeros(2, 3, 4), w=torch.zeros(2, T))


def test_language_models_are_all_tested():
    assert set(DECODERS) < set(LANGUAGE) < set(VARIANTS)


def test_gradients_pass_where_a_table_has_padding():
    """torch gives the padding row of a table no gradient; the mixed rows of other tokens must have theirs."""
    module = nn.Sequential(nn.Embedding(7, 4, padding_idx=1))
    module, merged = as_double(module, merged_for(module))
    ids, w = torch.tensor([[3, 4, 5], [2, 3, 6]]), weights(2, T).requires_grad_()
    install(module, merged).double()(ids, w=w).square().sum().backward()
    given = w.detach().clone().requires_grad_()
    tables = [merged.static("0.weight").double() + merged.deltas["0.weight"].mix(row) for row in given]
    torch.stack([table[some] for table, some in zip(tables, ids, strict=True)]).square().sum().backward()
    torch.testing.assert_close(w.grad, given.grad)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_token_may_have_weights_of_its_own(kind):
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    merged = merged_for(module, (kind,))
    ids, w = torch.tensor([[3, 4, 5], [2, 3, 6]]), weights(2, 3, T).float()
    found = install(module, merged)(ids, w=w)
    for place in ((0, 0), (0, 2), (1, 1)):
        alone = functional_call(module, dict(merged.state(w[place])), (ids[place][None, None],))
        close(found[place], alone[0, 0].double(), 2e-6)
