"""Experts as LoRA adapters, and decoders that learn to answer: a tiny random Llama and a tiny BERT."""

from dataclasses import dataclass, field, replace

import pytest
import small
import torch

from merging.backbones.hugging_face import HuggingFace
from merging.calibration import Calibration
from merging.checkpoints import StateDict
from merging.deltas import LowRank
from merging.errors import UserError
from merging.experts import Experts
from tasks import finetune
from tasks.adapters import Adapter
from tasks.answers import answer_losses
from tasks.engine import Engine
from tasks.expert_files import Bench
from tasks.recipes import Recipe
from tasks.split import Split, Texts
from tasks.suite import Suite
from tasks.task import array_task
from tasks.training import Job, Training

pytest.importorskip("peft")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 27
LLAMA = {"model_type": "llama", "vocab_size": 28, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": True,
         "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": END, "pad_token_id": END}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
ADAPTER = Adapter(r=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"])
RECIPE = Recipe(steps=16, batch=4, lr=3e-2, warmup=2, weight_decay=0.0, adapter=ADAPTER)


class Spelling:
    """A tokenizer of letters."""

    eos_token_id = END

    def get_vocab(self):
        return {letter: index for index, letter in enumerate(LETTERS)}

    def __call__(self, texts, **_):
        return {"input_ids": [[LETTERS.index(letter) for letter in text] for text in texts]}


@dataclass(frozen=True)
class Spelled(HuggingFace):
    @property
    def _tokenizer(self):
        return Spelling()


BACKBONE = Spelled("tiny", "LlamaForCausalLM", LLAMA, "last", "letters", length=12)
torch.manual_seed(7)
STATE = {key: value for key, value in BACKBONE.build().state_dict().items() if key != "lm_head.weight"}


@dataclass(frozen=True)
class Echo:
    """The letter that a text begins with is to be told twice."""

    name: str
    classes: tuple = ()
    ask: str = "text"
    asked: list = field(default_factory=list, compare=False)

    def split(self, name):
        texts = tuple(LETTERS[i % 7] + LETTERS[i % 5 : i % 5 + 3 + i % 3] for i in range(16))
        return Split(name, Texts(texts), torch.arange(16))

    def head(self):
        return None

    def told(self, inputs, labels):
        return list(inputs.items), [2 * text[0] for text in inputs.items]


def job(recipe=RECIPE):
    task = Echo("echo")
    return Job(STATE, BACKBONE, task, recipe, 0, task.split("train"), "")


def trained(recipe=RECIPE):
    training = Training(job(recipe))
    training.run()
    return training


def loss_of(tower):
    task = Echo("echo")
    split = task.split("train")
    with torch.no_grad():
        return float(answer_losses(BACKBONE, tower.eval(), *task.told(split.inputs, split.labels)).mean())


def test_the_loss_is_that_of_the_answer_without_padding_one_by_one():
    tower = BACKBONE.build()
    tower.load_state_dict(STATE, strict=False)
    pairs = [("abc", "de"), ("hello", "x"), ("q", "rst")]
    losses = answer_losses(BACKBONE, tower, *zip(*pairs, strict=True))
    for (prompt, answer), loss in zip(pairs, losses.detach(), strict=True):
        ids = [LETTERS.index(letter) for letter in prompt + answer] + [END]
        logp = tower(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        expected = [-float(logp[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
        assert float(loss) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_an_answer_may_not():
    tower = BACKBONE.build()
    cut, whole = (answer_losses(BACKBONE, tower, [prompt], ["ab"]) for prompt in ("xyz" + 10 * "c", 10 * "c"))
    torch.testing.assert_close(cut, whole)
    for answer in ("", 12 * "a"):
        with pytest.raises(UserError, match=r"backbone\.length=12"):
            answer_losses(BACKBONE, tower, ["abc"], [answer])


def test_only_factors_are_trained_and_they_lower_the_loss():
    training = trained()
    weights = training.weights()
    assert set(weights) == {
        f"model.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in (0, 1) for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj") for factor in "AB"
    }  # fmt: skip
    tower = BACKBONE.build()
    tower.load_state_dict(STATE, strict=False)
    assert loss_of(training.tower) < 0.9 * loss_of(tower)
    for key, value in training.tower.state_dict().items():
        if "lora" not in key:
            assert torch.equal(value, STATE.get(key.replace(".base_layer", ""), value)), key


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_going_on_from_a_snapshot_gives_the_same_factors():
    whole, stopped, resumed = trained(), Training(job()), Training(job())
    taken = {}
    stopped.run(lambda: taken.update(clones(stopped.snapshot())) if stopped.step == 5 else None)
    resumed.resume(5, taken)
    resumed.run()
    assert all(torch.equal(value, resumed.weights()[key]) for key, value in whole.weights().items())


def test_training_in_full_keeps_the_names_of_the_base():
    training = trained(replace(RECIPE, adapter=None, lr=3e-3))
    assert training.weights().keys() == STATE.keys() and loss_of(training.tower) < 3.2
    assert not torch.equal(training.weights()["model.embed_tokens.weight"], STATE["model.embed_tokens.weight"])


def test_activations_are_seen_of_a_model_whose_tied_weight_is_stored_once():
    split = Echo("echo").split("train")
    module = Calibration("train", (split.id,), (16,), lambda task, some: some, (None,), BACKBONE.build, {}).model(
        StateDict(STATE)
    )
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(module.lm_head.weight, STATE["model.embed_tokens.weight"])


@dataclass(frozen=True)
class Source(finetune.FineTuned):
    state: dict = field(default_factory=dict)

    def base(self, backbone, cache):
        return StateDict(self.state)


def test_experts_are_adapters_of_the_base_whose_products_are_the_trained_change(cache):
    source = Source("tiny", RECIPE, workers=1, state=STATE)
    experts = source.open(Suite("echo", (Echo("one"), Echo("two"))), BACKBONE, cache)
    key = "model.layers.1.mlp.down_proj.weight"
    low = experts.low_rank(key)
    assert isinstance(low, LowRank) and low.rank == 4
    alone = Training(replace(job(), task=Echo("one")))
    alone.run()
    module = alone.tower.get_submodule(key.removesuffix(".weight"))
    torch.testing.assert_close(experts.tau(key)[0], module.get_delta_weight("default").detach())
    assert not experts.tau("model.norm.weight").any()


def test_an_encoder_has_an_adapter_and_a_head_of_its_own(cache):
    backbone = HuggingFace("bert", "BertModel", BERT, "mean")
    ids = torch.randint(0, 40, (12, 6), generator=torch.Generator().manual_seed(0))
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(12) % 3
    task = array_task("task", {name: samples for name in ("train", "val")}, classes=("a", "b", "c"))
    adapter = Adapter(targets=["query", "value"])
    source = Source(
        "tiny", replace(RECIPE, head_lr=1e-2, adapter=adapter), workers=1, state=backbone.build().state_dict()
    )
    suite = Suite("one", (task,))
    experts = source.open(suite, backbone, cache)
    assert set(experts.heads["task"]) == {"classifier.weight", "classifier.bias"}
    assert experts.low_rank("encoder.layer.0.attention.self.query.weight").rank == 8
    assert source.headed(suite, backbone, cache).tasks[0].head().weight.shape == (3, 16)


def test_duet_finetune_writes_adapters_as_peft_does(tmp_path):
    base, recipe = StateDict(small.tower_state()), replace(RECIPE, steps=3, adapter=Adapter(r=2, targets=["c_fc"]))
    bench = Bench(base, small.TOWER, recipe, 0, tmp_path, Engine("cpu"))
    made = bench.make(small.Colours("hues"))
    assert made.path == tmp_path / "hues" / "adapter_model.safetensors"
    experts = Experts.open(base, [tmp_path / "hues"], ["hues"])
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert experts.low_rank(key).rank == 2 and experts.tau(key).any()
    assert not bench.make(small.Colours("hues")).fresh


def test_wrong_adapters_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"recipe: adapter\.r=0"):
        Adapter(r=0)
    with pytest.raises(UserError, match="frozen and adapter are both set"):
        replace(RECIPE, frozen=["x"])
    with pytest.raises(UserError, match=r"adapter\.targets=\('no_such_layer',\) cannot be adapted"):
        Training(job(replace(RECIPE, adapter=Adapter(targets=["no_such_layer"]))))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match="package peft"):
        Training(job())
