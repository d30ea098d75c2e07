"""Language models that are asked: choices by likelihood and texts written, against whole sequences run one by one."""

from dataclasses import replace

import pytest
import torch
from speakers import SPEAKERS, WORDS, module, speaker, weights
from torch import nn

from merging.backbones.language import LOWEST
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Routing
from merging.methods import Average, Expert, Twin
from merging.routing.gates import Gate, GateShape, listening
from merging.routing.install import install
from tasks.engine import Engine
from tasks.evaluate import Grid, answer
from tasks.generation.task import ChoiceTask, TextTask
from tasks.generation.texts import RULES, decoded, encoded, number, ruled, split_of
from tasks.journal import Journal
from tasks.metrics import measure
from tasks.split import take
from tasks.suite import Suite, calibration
from tasks.task import Arrays, reading

pytest.importorskip("transformers").logging.set_verbosity_error()
PROMPTS = ["a b", "c", "d e f g h a", "b b c", "h g f"]
CHOICES = [(" yes", " no", " may be"), (" a b c", " d"), (" no", " yes"), (" e", " f"), (" may", " may be", " no")]


class Given(Arrays):
    """Splits as they are."""

    def split(self, name):
        return self.splits[name]


def choosing(**options):
    split = split_of("test", list(zip(PROMPTS, CHOICES, strict=True)), [0, 1, 0, 1, 2])
    return ChoiceTask("choose", Given({"test": split, "val": split}), **options)


def writing(**options):
    split = split_of("test", PROMPTS, ["yes", "no", "a", "b", "c d"])
    return TextTask("write", Given({"test": split, "val": split}), **{"tokens": 5, **options})


def tokens(text):
    return [WORDS.index(word) for word in text.split(" ") if word]


def by_hand(backbone, model, prompt, choice):
    """Log-likelihood of a choice in one forward over the whole sequence, without cache or padding."""
    ids, rest = tokens(prompt), tokens(choice)
    if backbone.two_stacks:
        inputs = {"input_ids": torch.tensor([[*ids, 2]]), "decoder_input_ids": torch.tensor([[0, *rest]])}
        rest = [*rest, 2]
        logits = model(**inputs).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*ids, *rest]])).logits[0, len(ids) - 1 : -1]
    return float(sum(logits.log_softmax(-1)[i, token] for i, token in enumerate(rest)))


def asked(backbone, model, task, which=slice(None), **options):
    prepare, read, _ = reading(backbone, task)
    return answer(model, prepare(take(task.split("test").inputs, which)), read=read, **options)[0]


@pytest.mark.parametrize("name", SPEAKERS)
class TestEverySpeaker:
    @torch.no_grad()
    def test_choices_score_as_whole_sequences_do(self, name, tmp_path):
        backbone, task = speaker(name, tmp_path), choosing()
        model = module(backbone)
        found = asked(backbone, model, task)
        for row, (prompt, choices) in zip(found, task.split("test").inputs, strict=True):
            expected = [by_hand(backbone, model, prompt, choice) for choice in choices]
            assert row.tolist()[: len(choices)] == pytest.approx(expected, abs=2e-5)
            assert row.tolist()[len(choices) :] == [torch.tensor(LOWEST).item()] * (3 - len(choices))
        alone = torch.cat([nn.functional.pad(asked(backbone, model, task, slice(i, i + 1)), (0, 1), value=LOWEST)[:, :3]
                           for i in range(5)])  # fmt: skip
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-6)

    @torch.no_grad()
    def test_texts_are_written_as_by_the_most_likely_token_one_by_one(self, name, tmp_path):
        backbone, task = speaker(name, tmp_path), writing()
        model = module(backbone)
        found = decoded(asked(backbone, model, task))
        assert len(set(found)) > 2 and decoded(asked(backbone, model, task, slice(1, 2))) == found[1:2]
        for text, prompt in zip(found, task.split("test").inputs, strict=True):
            ids, new = tokens(prompt), []
            while len(new) < 5:
                sequence = {"input_ids": torch.tensor([[*ids, 2]]), "decoder_input_ids": torch.tensor([[0, *new]])}
                sequence = sequence if backbone.two_stacks else {"input_ids": torch.tensor([ids + new])}
                token = int(model(**sequence).logits[0, -1].argmax())
                if token in (2, 4):  # the end and a new line
                    break
                new.append(token)
            assert text == backbone.text(new)

    @torch.no_grad()
    @pytest.mark.parametrize("make", [choosing, writing])
    def test_an_oracle_answers_as_the_folded_expert(self, name, make, tmp_path):
        backbone, task = speaker(name, tmp_path), make()
        experts = Experts.open(weights(name, 0), [weights(name, 1), weights(name, 2)], ("one", "two"))
        merged = Twin(keep=0.7)(experts)
        routed, folded = install(backbone.build(), merged), backbone.build()
        prepare, read, _ = reading(backbone, task)
        inputs = prepare(task.split("test").inputs)
        for index in range(2):
            w = merged.one_hot(index)
            folded.load_state_dict(dict(merged.state(w)), strict=False)
            found, expected = (answer(model, inputs, read=read)[0] for model in (Under(routed, w), folded))
            assert torch.equal(found, expected) if make is writing else torch.allclose(found, expected, atol=1e-4)


class Under(nn.Module):
    """A routed model under a given w."""

    def __init__(self, routed, w):
        super().__init__()
        self.routed, self.w = routed, w

    def forward(self, **inputs):
        return self.routed(**inputs, **({} if {"cache", "past_key_values"} & inputs.keys() else {"w": self.w}))

    def generate(self, **inputs):
        return self.routed.generate(**inputs, w=self.w)


def gated(name, backbone, sees):
    """A merge whose gates tell prompts apart."""
    experts = Experts.open(weights(name, 0), [weights(name, 1), weights(name, 2)], ("choose", "write"))
    merged, shape = Twin(keep=0.7)(experts), GateShape(sees=sees, activation="none")
    count = 2 if sees == "block" else 1
    torch.manual_seed(3)
    gates = nn.ModuleList([Gate(16, 2, shape).eval().requires_grad_(False) for _ in range(count)])
    for gate in gates:
        nn.init.normal_(gate.net[-1].weight, std=1.0)
    return replace(merged, routing=Routing("tested", gate=shape, gates=gates))


@pytest.mark.parametrize(("name", "sees"), [("gpt2", "block"), ("llama", "early"), ("qwen2", "pass"), ("t5", "early")])
@torch.no_grad()
def test_w_is_decided_once_for_a_prompt_and_kept(name, sees, tmp_path):
    backbone = speaker(name, tmp_path)
    merged = gated(name, backbone, sees)
    routed = install(backbone.build(), merged)
    for task in (choosing(), writing()):
        prepare, read, _ = reading(backbone, task)
        inputs = task.split("test").inputs
        with listening() as heard:
            together = read(routed, prepare(inputs))
        assert len(heard) == (2 if sees == "block" else 1) and float(heard[0].std(0).max()) > 0.05
        for index in range(5):
            with listening() as own:
                alone = read(routed, prepare(take(inputs, slice(index, index + 1))))[0]
            torch.testing.assert_close(own[0][0], heard[0][index], atol=1e-5, rtol=0)
            assert torch.allclose(together[index][: len(alone)], alone, atol=1e-4)
            if sees != "block":
                folded = backbone.build()
                folded.load_state_dict(dict(merged.state(own[0][0])), strict=False)
                assert torch.allclose(read(folded, prepare(take(inputs, slice(index, index + 1))))[0], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_suite_of_both_kinds_is_scored(name, tmp_path):
    """Experts, a search of coefficients and gates; batches of two and of five give the same; a journal goes on."""
    backbone, tasks = speaker(name, tmp_path), (choosing(), writing(metrics=("exact_match", "rouge2")))
    suite = Suite("both", tasks)
    experts = Experts.open(weights(name, 0), [weights(name, 1), weights(name, 2)], suite.names)
    grids = [Grid(suite, backbone, Engine("cpu", batch=batch)) for batch in (2, 5)]
    for method in (Expert(), Average()):
        first, second = (grid.score(method(experts), "test") for grid in grids)
        assert first.scores == second.scores and first.scores["write"].parts.keys() == {"rouge2"}
    along = grids[0].at_scales(Average()(experts), [0.3, 1.0], "val")
    assert along[1] == grids[1].score(Average()(experts).scaled(1.0), "val").scores
    merged, journal = gated(name, backbone, "early"), Journal(tmp_path / "journal")
    first, second = (grids[0].score(merged, "test", journal=journal) for _ in range(2))
    assert first == second == grids[0].score(merged, "test") and first.routing is not None
    assert len(list((tmp_path / "journal").iterdir())) == 2


def test_what_is_learned_from_prompts_has_gradients(tmp_path):
    backbone = speaker("llama", tmp_path)
    data, model = calibration(Suite("both", (choosing(), writing())), backbone, "test"), module(backbone)
    for task, width in ((0, 3), (1, 19)):
        outputs = data.features(model, data.inputs(task, torch.arange(3)))
        assert outputs.shape == (3, width)
        outputs.softmax(-1).square().sum().backward()
        assert float(model.model.layers[0].mlp.up_proj.weight.grad.norm()) > 0
        model.zero_grad()


def test_bf16_is_autocast(tmp_path):
    backbone, task = speaker("llama", tmp_path), choosing()
    exact, rough = (
        asked(backbone, module(backbone), task, engine=Engine("cpu", precision=kind)) for kind in ("fp32", "bf16")
    )
    assert rough.dtype == torch.float32 and 1e-6 < float((rough - exact)[:, :2].norm() / exact[:, :2].norm()) < 0.05


def test_likelihoods_are_divided(tmp_path):
    backbone = speaker("llama", tmp_path)
    model = module(backbone)
    plain, token, character = (asked(backbone, model, choosing(per=per)) for per in ("answer", "token", "character"))
    choices = [choices for _, choices in choosing().split("test").inputs]
    for row, many in enumerate(choices):
        for column, choice in enumerate(many):
            assert float(token[row, column]) == pytest.approx(float(plain[row, column]) / len(tokens(choice)), rel=1e-5)
            assert float(character[row, column]) == pytest.approx(float(plain[row, column]) / len(choice), rel=1e-5)


def test_long_prompts_are_refused_or_cut_and_counted(tmp_path):
    backbone, model = speaker("gpt2", tmp_path, length=6), module(speaker("gpt2", tmp_path))
    for task in (choosing(), writing()):
        experts = Experts.open(weights("gpt2", 0), [weights("gpt2", 1)], (task.name,))
        with pytest.raises(UserError, match=rf"A prompt of {task.name} has \d tokens, and \d fit: .*long=cut"):
            Grid(Suite("one", (task,)), backbone).score(Average()(experts), "test")
    cut = choosing(long="cut")
    assert reading(backbone, cut).notes(cut.split("test").inputs) == [
        "1 of 5 prompts lost their beginning, to fit into 6 tokens with their answers"
    ]
    last = asked(backbone, model, cut)[-1]
    choices = cut.split("test").inputs[4][1]
    assert last[:2].tolist() == pytest.approx(
        [by_hand(backbone, model, "e f g h a", choice) for choice in choices], abs=2e-5
    )


def test_bad_input(tmp_path):
    backbone = speaker("llama", tmp_path)
    with pytest.raises(UserError, match=r"Prompt 1 of test is an empty text"):
        split_of("test", ["a", " "], [0, 1])
    with pytest.raises(UserError, match=r"test has 1 prompts and 2 answers"):
        split_of("test", ["a"], [0, 1])
    with pytest.raises(UserError, match=r"long='left' is unknown. Choose one of refuse, cut"):
        choosing(long="left")
    with pytest.raises(UserError, match=r"per='byte' is unknown. Choose one of answer, token, character"):
        choosing(per="byte")
    with pytest.raises(UserError, match=r"The rules of write have upper. There are strip, lower"):
        writing(rules=["upper"])
    for item in (("a b", ("", " c")), ("a b", ())):
        task = ChoiceTask("choose", Given({"test": split_of("test", [item], [0])}))
        with pytest.raises(UserError, match=r"choose asks 'a b' with an empty choice, or none"):
            asked(backbone, None, task)
    task = ChoiceTask("choose", Given({"test": split_of("test", [("a b", (" ", " c"))], [0])}))
    with pytest.raises(UserError, match=r"no token is left of it before its choices, or none of one"):
        asked(backbone, None, task)
    broken = {key: value.fill_(torch.nan) for key, value in module(backbone).state_dict().items()}
    experts = Experts.open(weights("llama", 0), [weights("llama", 0)], ("write",))
    grid = Grid(Suite("one", (writing(),)), backbone)
    with grid.module() as model:
        model.load_state_dict(broken)
        assert asked(backbone, model, writing()).isnan().all()
    assert grid.score(Average()(experts), "test").scores["write"].count == 5


def test_texts_are_tensors_and_rules_are_data():
    texts = ["", "naïve café", "日本"]
    assert decoded(encoded(texts)) == texts and encoded(texts).dtype == torch.uint8
    assert ruled("  The  Answer: 42! ", ["lower", "no_punctuation", "no_articles", "one_space"]) == "answer 42"
    assert ruled(" a\nb", ["first_line"]) == "a" and len(RULES) == 6
    assert [number(text) for text in ("3.8", " -2", "three", "nan", "4.")] == [3.8, -2.0, 0.0, 0.0, 4.0]


def test_scores_of_texts():
    predicted, labels = encoded(["the cat sat down", "a dog", "x"]), encoded(["the cat sat up", "a dog", "y z"])
    score = measure(
        ["rouge2", "exact_match"], "any", predicted, encoded(["the cat sat up", "a dog", "y z", " " * 16])[:3]
    )
    assert score.value == pytest.approx((2 / 3 + 1 + 0) / 3) and score.parts == {"exact_match": 1 / 3}
    spread = torch.tensor([2 / 3, 1.0, 0.0]).std(correction=0) / 3**0.5
    assert score.standard_error == pytest.approx(float(spread))
    with pytest.raises(UserError, match=r"accuracy is not defined for the task any: it compares classes"):
        measure(["accuracy"], "any", predicted, labels)
    with pytest.raises(UserError, match=r"rouge2 is not defined for the task any: it compares texts"):
        measure(["rouge2"], "any", torch.tensor([1]), torch.tensor([1]))
