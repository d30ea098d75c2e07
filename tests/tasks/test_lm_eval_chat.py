"""Chat templates around lm-eval's prompts, and what cannot be learned from prompts alone."""

from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="pip install 'duet-merging[llm]'")

import harness_tasks as tiny
from test_lm_eval import by_lm_eval, folded, quick, suite  # noqa: F401

from launchers.preflight import check_learning, foresee
from merging.errors import UserError
from merging.fit.descent import Descent
from merging.fit.gates import Gradient, Learned, Oracle, TaskId
from merging.fit.objectives import CrossEntropy, Entropy, FeatureDistillation
from merging.methods import AdaMerging, Average, Expert, Multitask, RegMean, Ties, Twin
from merging.routing.gates import GateShape
from tasks.engine import Engine
from tasks.evaluate import Grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return tiny.write_tokenizer(tmp_path_factory.mktemp("chatty"), tiny.CHAT)


@pytest.fixture(scope="module")
def backbone(chatty):
    return tiny.backbone(chatty)


def asked(folder, tokenizer, *tasks, **options):
    return suite(folder, *tasks, chat_template=True, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("shots", [None, 1])
def test_a_static_merge_scores_what_lm_eval_says_with_the_template(folder, chatty, backbone, shots):
    tasks = ("colours", "writes")
    merged = Average()(tiny.experts(tasks))
    scores = Grid(asked(folder, chatty, *tasks, num_fewshot=shots), backbone).score(merged, "test").scores
    module = folded(backbone, merged)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": shots}
    for task, score in scores.items():
        assert score.value == by_lm_eval(module, backbone, folder, task, **options)[f"{score.metric},none"]


def test_a_routed_merge_that_knows_the_task_scores_as_the_experts(folder, chatty, backbone):
    ours = asked(folder, chatty, "colours", "writes")
    made = tiny.experts(ours.names)
    scores = [Grid(ours, backbone).score(method(made), "test").scores for method in (Twin(keep=1.0), Expert())]
    assert scores[0] == scores[1]


def test_gates_see_the_text_that_is_asked(folder, chatty, backbone):
    bare, (task,) = suite(folder, "colours").tasks[0], asked(folder, chatty, "colours").tasks
    text = "what is the colour of a sky ?"
    assert bare.split("test").inputs[0] == text and task.split("test").inputs[0] == f" {text} then"  # <s> is put there
    assert bare.content("test") != task.content("test")
    assert backbone.ids([task.split("test").inputs[0]]) == backbone.ids([f"{text} then"])
    assert task.notes() == ["colours: asked in the chat template of the tokenizer."]


def test_a_tokenizer_without_a_template_is_refused(folder, backbone, tmp_path):
    bare = tiny.write_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no chat template\. Set suite\.chat_template=false"):
        foresee(asked(folder, bare, "colours"), None, backbone, Engine("cpu"), ["test"])
    with pytest.raises(UserError, match=r"the backbone names none\. Set suite\.tokenizer"):
        asked(folder, None, "colours")
    with pytest.raises(UserError, match=r"suite\.tokenizer=.*nowhere holds none that transformers reads"):
        asked(folder, str(tmp_path / "nowhere"), "colours").tasks[0].split("test")


def test_a_template_that_fails_is_refused(folder, tmp_path):
    picky = tiny.write_tokenizer(tmp_path / "picky", "{{ raise_exception('turns must alternate') }}")
    with pytest.raises(UserError, match=r"cannot make the prompts of colours: turns must alternate"):
        asked(folder, picky, "colours").tasks[0].split("test")


def descending(*objectives):
    return Learned("mine", train=Gradient(objectives))


class TestLearning:
    @pytest.mark.parametrize(
        ("method", "router", "message"),
        [
            (AdaMerging(), Oracle(), r"AdaMerging learns from a model's predictions \(entropy\), and colours, writes"),
            (AdaMerging(train=Descent([CrossEntropy()])), Oracle(), r"predictions \(cross_entropy\)"),
            (Multitask(), Oracle(), "Multitask learns from labels"),
            (Twin(), descending(Entropy(), FeatureDistillation()), "router=mine learns from a model's predictions"),
            (Twin(), Learned(gate=GateShape(granularity="batch")), "granularity=batch gives no weights of one prompt"),
        ],
    )
    def test_from_answers_is_refused(self, folder, method, router, message):
        with pytest.raises(UserError, match=message):
            check_learning(suite(folder, "colours", "writes"), method, router)

    @pytest.mark.parametrize(
        ("method", "router"),
        [(Ties(), Oracle()), (RegMean(), Oracle()), (Twin(), Learned(train=TaskId())),
         (Twin(), descending(FeatureDistillation()))],
    )  # fmt: skip
    def test_from_prompts_is_not(self, folder, method, router):
        check_learning(suite(folder, "colours", "writes"), method, router)

    def test_tasks_with_answers_of_their_own_are_learned_from(self):
        check_learning(SimpleNamespace(tasks=[SimpleNamespace(name="pets")]), AdaMerging(), Oracle())

    def test_prompts_that_are_missing_are_told_before_experts_are_opened(self, folder, backbone):
        ours = suite(folder, "alone")
        foresee(ours, None, backbone, Engine("cpu"), ["test"])
        with pytest.raises(UserError, match="alone has no documents for the split calibration"):
            foresee(ours, None, backbone, Engine("cpu"), ["test", "calibration"])
        with pytest.raises(UserError, match="weighs weighs whole texts, without a prompt"):
            foresee(suite(folder, "weighs"), None, backbone, Engine("cpu"), ["test", "calibration"])
