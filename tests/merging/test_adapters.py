"""LoRA experts merged by their factors: the numbers of the dense path, no matrix of theirs, and peft's own merge."""

import copy
from dataclasses import replace

import pytest
import torch
from ffns import Given
from samples import drawn, family, tower

from merging import Experts, UserError, merge
from merging.checkpoints import StateDict
from merging.checkpoints.key_maps import from_hugging_face, to_hugging_face
from merging.checkpoints.lora import Lora, LoraConfig
from merging.combined import Combined, mix_of
from merging.decompose.ranks import Ranks
from merging.deltas import LowRank, Rows
from merging.methods import (
    Aswudi,
    Average,
    DcMerge,
    Doge,
    Duet,
    Expert,
    IsoC,
    Opcm,
    OptMerge,
    RankOneMoe,
    Smile,
    Swudi,
    Ties,
    TsvM,
    Twin,
    Wemoe,
    Wudi,
)
from merging.methods import TaskArithmetic as Ta

T = 3
BLOCK = "visual.transformer.resblocks.1."
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2")
W = torch.tensor([0.7, -1.3, 2.1])
HALF = torch.stack([torch.arange(64) % 2 == 0, torch.arange(64) % 3 == 0, torch.arange(64) < 5])
MASKS = {f"visual.transformer.resblocks.{block}": HALF for block in (0, 1)}


def adapter(base, task, modules=MODULES, rank=None):
    """Random factors of ranks 1, 2, 3 on the last block, and for the second task on all."""
    rank, tensors = rank or 1 + task, {}
    for layer in (0, 1) if task == 1 else (1,):
        for module in modules:
            name = f"vision_model.encoder.layers.{layer}.{module}"
            out, into = base.specs()[f"{name}.weight"].shape
            seed = 100 * task + 10 * layer + len(module)
            tensors[f"base_model.model.{name}.lora_A.weight"] = drawn(rank, into, seed=seed)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.3 * drawn(out, rank, seed=seed + 5)
    return StateDict(tensors), LoraConfig(rank, 2 * rank, use_rslora=task == 2)


def pair(separate=False):
    """The same experts as adapters and as whole checkpoints; the base is 0, so that differences are not rounded."""
    zero = {key: torch.zeros_like(value) for key, value in family(0, tower())[0].items() if key != "position_ids"}
    stored = to_hugging_face(StateDict(zero))
    adapted = [from_hugging_face(Lora(stored, *adapter(stored, task))) for task in range(T)]
    whole = [StateDict({key: each.tensor(key) for key in each.specs()}) for each in adapted]
    return [
        replace(Experts.open(from_hugging_face(stored), experts), separate_qkv=separate) for experts in (adapted, whole)
    ]


def near(found, expected, message="", scale=None):
    """Relative to the expected numbers, or to those of which they are what is left."""
    scale = float(expected.double().norm()) if scale is None else scale
    assert float((found.double() - expected.double()).norm()) <= 1e-6 * scale + 1e-12, message


METHODS = [
    Average(), Ta(), Ta(kinds={"ffn": 0.5, "norm": 0.1}), Ties(0.3), Ties(0.3, "mean"), Expert(),
    Twin(keep=0.2), Twin(keep=0.1, split_qkv=False), Twin(Average(), rank=2), Twin(measure="energy", keep=0.7),
    Twin(Ta(kinds={"attention": 0.7}), keep=0.2), Twin(Ties(), keep=0.2), Twin(sparsify="magnitude", keep=0.2),
    Duet("all", Ranks("absolute", 3), static=False), Duet(ranks=Ranks("energy", 0.2), neurons=Given(given=MASKS)),
    Duet(ranks=Ranks("absolute", 2), neurons=Given(given=MASKS, scale="energy")),
    Duet(ranks=Ranks("absolute", 2, task=2), neurons=Given(given=MASKS, scale="learned")),
    Duet(ranks=Ranks("absolute", 2), neurons=Given(given=MASKS), average="kept"),
    Duet("all", Ranks("absolute", 2), factors="svd", static=False), Duet("all", Ranks("fraction", 1.0), static=False),
    Duet(ranks=Ranks("absolute", 3), unit="block", static=False),
    Duet(ranks=Ranks("absolute", 2), unit="model", neurons=Given(given=MASKS)),
    TsvM(), IsoC(), Smile(rank=3, gate_rank=2), RankOneMoe(2), Wemoe(), Wemoe(0.2),
    Wudi(steps=5, scale=0.4), Swudi(), Aswudi(), OptMerge(steps=5), OptMerge("lora", steps=5), Doge(steps=5),
    DcMerge(), Opcm(),
]  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda each: f"{type(each).__name__}")
def test_factors_give_what_whole_matrices_give(method, separate):
    found, expected = (method(each) for each in pair(separate))
    assert found.deltas.keys() == expected.deltas.keys()
    sizes = {key: float(tau.norm()) for key, tau in pair()[1].stream()}
    for key, size in sizes.items():
        near(found.static(key), expected.static(key), key, size)
    for key, delta in found.deltas.items():
        each = delta.parts // T  # several components of a task
        for w in (*torch.eye(T), W):
            w = w.repeat_interleave(each)
            near(delta.mix(w), expected.deltas[key].mix(w), key, sizes[key])
    assert found.energy.keys() == expected.energy.keys()
    for key, shares in found.energy.items():
        assert shares == pytest.approx(expected.energy[key], abs=2e-6), key


def test_another_scale_of_the_shared_expert():
    found, expected = (Twin(keep=0.2)(each).scaled(0.9) for each in pair())
    for key, delta in found.deltas.items():
        near(found.static(key), expected.static(key), key)
        near(delta.mix(W), expected.deltas[key].mix(W), key)


@pytest.mark.parametrize(
    "method",
    [
        Average(),
        Ta(),
        Ties(),
        Expert(),
        Twin(keep=0.2),
        Twin(Average()),
        Duet(static=False),
        Duet(static=False, unit="model"),
    ],
)
def test_no_task_vector_is_made_whole(method, monkeypatch):
    """Neither is one read: the base is opened for its names alone, and experts for their factors."""
    experts = pair()[0]

    def refuse(*_):
        pytest.fail("a whole matrix was read")

    for checkpoint in (experts.origin, *experts.checkpoints):
        monkeypatch.setattr(checkpoint, "tensor", refuse)
    monkeypatch.setattr(LowRank, "part", refuse, raising=False)
    if isinstance(method, Ties):  # which looks for tied weights
        monkeypatch.setattr(Experts, "tied", {})
    if isinstance(method, Twin | Duet):  # vectors are whole
        whole = Experts.tau
        monkeypatch.setattr(
            Experts, "tau", lambda self, key, *rest: refuse() if self.low_rank(key).rank and len(
                self.specs()[key].shape) == 2 else whole(self, key, *rest))  # fmt: skip
    method(experts)


class TestForms:
    def test_ranks_differ_by_expert_and_by_module(self):
        experts = pair()[0]
        assert experts.delta(f"{BLOCK}mlp.c_fc.weight").ranks == (1, 2, 3)
        assert experts.delta(f"{BLOCK}attn.in_proj_weight").ranks == (2, 4, 6)  # of q and v; k has rank 0
        assert experts.delta("visual.transformer.resblocks.0.mlp.c_fc.weight").ranks == (0, 2, 0)
        assert experts.delta("visual.ln_post.weight").ranks == (0, 0, 0)

    def test_what_stays_low_rank(self):
        experts, key = pair()[0], f"{BLOCK}attn.in_proj_weight"
        shared = Ta()(experts).shared
        assert isinstance(shared, Combined) and {key for key in shared if mix_of(shared, key)} == {
            key for key in experts.specs() if experts.delta(key).rank
        }
        blocks = Twin(keep=0.2)(experts).deltas[key]
        assert isinstance(blocks, Rows) and [type(block) for block in blocks.blocks] == [LowRank] * 3
        assert blocks.blocks[1].rank == 0 and blocks.blocks[0].rank == min(3, 6)

    def test_an_adapter_of_another_base_is_read_whole(self):
        experts, _ = pair()
        other = from_hugging_face(to_hugging_face(StateDict(
            {key: torch.ones_like(experts.origin.tensor(key)) for key in experts.origin.specs()})))  # fmt: skip
        moved = replace(experts, origin=other)
        assert moved.low_rank(f"{BLOCK}mlp.c_fc.weight") is None
        near(moved.tau(f"{BLOCK}ln_1.weight"), -torch.ones(T, *tower()[f"{BLOCK}ln_1.weight"]))

    def test_factors_that_are_not_finite(self):
        base = StateDict({"a.weight": drawn(4, 6)})
        tensors = {"a.lora_A.weight": torch.full((1, 6), float("inf")), "a.lora_B.weight": drawn(4, 1)}
        expert = Lora(base, StateDict(tensors), LoraConfig(1, 1))
        for method in (Average(), Ties(), Twin(start=None)):
            with pytest.raises(UserError, match=r"a\.weight is not finite .* in the expert for task0"):
                method(Experts.open(base, [expert, expert]))


@pytest.fixture
def written(tmp_path):
    """Folders of adapters of one model as peft saves them, with random factors, and their merged weights."""
    peft = pytest.importorskip("peft")

    def write(model, *configs):
        made = []
        for index, options in enumerate(configs):
            adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
            for seed, (name, parameter) in enumerate(adapted.named_parameters()):
                if "lora_" in name:
                    parameter.data = 0.3 * drawn(*parameter.shape, seed=100 * index + seed)
            adapted.save_pretrained(tmp_path / str(index))
            made.append((tmp_path / str(index), adapted.merge_and_unload().state_dict()))
        return made

    return write


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 6, "bos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=1, **options))


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11, tie_word_embeddings=False))


class TestAgainstPeft:
    """Its merged models, their mean and each of them, from folders that it wrote."""

    @pytest.mark.parametrize(
        ("model", "configs"),
        [
            (gpt2, [{"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True},
                    {"r": 5, "lora_alpha": 4, "target_modules": ["c_fc", "c_attn"], "use_rslora": True,
                     "fan_in_fan_out": True}]),
            (llama, [{"r": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 7}},
                     {"r": 3, "target_modules": ["embed_tokens", "v_proj"], "alpha_pattern": {"v_proj": 16}}]),
        ],
        ids=["gpt2", "llama"],
    )  # fmt: skip
    def test_weights(self, written, model, configs):
        model = model()
        (one, first), (other, second) = written(model, *configs)
        base = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if key != "lm_head.weight" or model.lm_head.weight is not model.get_input_embeddings().weight
        }
        merged = merge(Average(), base, [one, other])
        assert any(mix_of(merged.shared, key) for key in merged.shared)
        for key in merged.specs:
            near(merged.static(key), (first[key] + second[key]) / 2, key)
        routed = Expert(), Twin(keep=1.0, start=None), Twin(Average(), keep=1.0, start=None)
        full = Duet("all", Ranks("energy", 0.0), static=False, rest=Average())
        for method in (*routed, full):  # nothing is lost: every task has its own expert back
            merged = merge(method, base, [one, other])
            for key, delta in merged.deltas.items():
                for task, state in enumerate((first, second)):
                    still, change = merged.static(key), delta.mix(torch.eye(2)[task])
                    near(still + change, state[key], key, float(still.norm() + change.norm()))

    def test_fused_columns_of_gpt2_are_cut(self, written):
        model = gpt2()
        ((one, _),) = written(model, {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True})
        base = {key: each for key, each in model.state_dict().items() if key != "lm_head.weight"}
        delta = merge(Twin(keep=1.0), base, [one, one]).deltas["transformer.h.0.attn.c_attn.weight"]
        assert isinstance(delta, Rows) and delta.axis == 1 and [block.shape for block in delta.blocks] == [(8, 8)] * 3

    def test_a_table_that_the_output_layer_shares_is_refused(self, written):
        """Where the model is written as one tensor or as two; peft leaves the output alone, its merge does not."""
        model = gpt2()
        ((folder, _),) = written(model, {"r": 2, "target_modules": ["wte"], "task_type": "CAUSAL_LM"})
        state = model.state_dict()
        for base, shared in (
            (state, r"lm_head\.weight"),
            ({key: state[key] for key in state if key != "lm_head.weight"}, "the output layer"),
        ):
            with pytest.raises(UserError, match=rf"changes transformer\.wte\.weight, which {shared} shares"):
                Experts.open(base, [folder])

    def test_modules_trained_in_full(self, written):
        """A projection that all have is merged; heads of different sizes, which peft saves too, belong to the tasks."""
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.RobertaConfig(**sizes, vocab_size=11, max_position_embeddings=9)
        states, folders = [], []
        torch.manual_seed(0)
        model = transformers.RobertaForSequenceClassification(config)
        options = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
        for folder, state in written(model, options, options | {"r": 3}):
            folders.append(folder)
            states.append(state)
        base = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier")}
        experts = Experts.open(base, folders)
        assert not any("classifier" in key for key in experts.specs())
        assert {key for key in experts.left_out[0].specs()} == {key for key in states[0] if "classifier" in key}
        for key, change in Average()(experts).shared.items():
            near(change, sum(state[key] - base[key] for state in states) / 2, key, float(base[key].norm()))

    def test_an_adapter_cannot_be_the_base(self, written):
        ((folder, _),) = written(llama(), {"r": 2, "target_modules": ["q_proj"]})
        with pytest.raises(UserError, match="is an adapter, which cannot be the base"):
            Experts.open(folder, [folder])


def test_adapters_of_adapters_know_what_they_change():
    assert all(each.adapts for each in pair()[0].checkpoints)
