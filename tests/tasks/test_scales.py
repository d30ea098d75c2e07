"""The coefficient of a merge: every candidate is scored as it would be alone, and the best is really the best."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import small
import torch

from merging.errors import UserError
from merging.experts import Experts
from merging.methods import Average, TaskArithmetic, TsvM, Twin, Wemoe
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.journal import Journal
from tasks.scales import Fixed, Search, coarse, worth
from tasks.scales import seconds as seconds_of
from tasks.score import Score

NAMES = ("hues", "tints", "shades")
TENTHS = [round(0.1 * step, 1) for step in range(1, 31)]


@pytest.fixture
def suite():
    return small.suite(*NAMES)


@pytest.fixture(scope="module")
def experts():
    """Any three towers about as far from the base as it is from zero."""
    base = small.tower_state()
    made = [{key: base[key] + other for key, other in small.tower_state(seed).items()} for seed in (1, 2, 3)]
    return Experts.open(base, made, NAMES)


@pytest.fixture
def takes(monkeypatch):
    """Sets how long one scale takes."""
    return lambda seconds: monkeypatch.setattr("tasks.scales.seconds", lambda grid, merged, split: seconds)


@pytest.fixture(autouse=True)
def quick(takes):
    takes(0.0)


def of(values):
    """Scores of these values."""
    return {task: Score("accuracy", value, 10, 0.0) for task, value in values.items()}


def told(curve):
    """A grid double that looks scores up by scale."""
    asked = []

    def at_scales(merged, scales, split, journal):
        asked.extend(scales)
        return [of(curve[scale]) for scale in scales]

    return SimpleNamespace(at_scales=at_scales, asked=asked)


def unasked(split):
    raise AssertionError("nobody asked for the experts")


def perfect(split):
    return of(dict.fromkeys(NAMES, 1.0))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "method", [TaskArithmetic(), Wemoe(), Twin(keep=0.5), TsvM()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("separate", [False, True])
def test_candidates_score_as_each_of_them_alone(suite, experts, method, separate, workers, monkeypatch):
    monkeypatch.setattr(Engine, "workers", workers)
    merged = method(replace(experts, separate_qkv=separate))
    grid = Grid(suite, small.TOWER, Engine("cpu", batch=7))
    found = grid.at_scales(merged, [0.1, 0.7, 3.0], "val")
    assert found == [grid.score(merged.scaled(scale), "val").scores for scale in (0.1, 0.7, 3.0)]
    assert found[0] != found[1] or found[1] != found[2]


def test_a_batch_is_prepared_once_for_all_candidates(suite, experts):
    prepared = []
    calls = {"build": small.TOWER.build, "features": small.TOWER.features}
    backbone = SimpleNamespace(**calls, prepare=lambda x: prepared.append(len(x)) or small.TOWER.prepare(x))
    Grid(suite, backbone, Engine("cpu", batch=10)).at_scales(TaskArithmetic()(experts), TENTHS, "val")
    assert sorted(prepared) == sorted(3 * [10, 10, 4])


def test_a_candidate_that_gives_no_numbers_gets_nothing_right(suite, experts):
    merged = TaskArithmetic()(experts)
    first, last = Grid(suite, small.TOWER).at_scales(merged, [0.3, 1e38], "val")
    assert first == Grid(suite, small.TOWER).score(merged.scaled(0.3), "val").scores
    assert [score.value for score in last.values()] == [0.0] * 3


@pytest.mark.parametrize("seed", range(40))
def test_the_whole_list_is_scored_and_the_first_of_the_best_is_taken(experts, seed):
    """On curves with noise and plateaus, where a climb misses the maximum."""
    rng, peak = random.Random(seed), random.Random(seed).choice(TENTHS)
    curve = {s: {"a": max(0.0, round(0.9 - 0.2 * abs(s - peak) + rng.gauss(0, 0.05), 1)), "b": 0.5} for s in TENTHS}
    grid, top = told(curve), max(each["a"] for each in curve.values())
    chosen = Search(random.Random(seed).sample(TENTHS, 30), "mean").choose(TaskArithmetic()(experts), grid, unasked)
    assert chosen.merged.scale == next(scale for scale in TENTHS if curve[scale]["a"] == top)
    assert chosen.validation == of(curve[chosen.merged.scale]) and sorted(grid.asked) == TENTHS
    assert chosen.search == {"criterion": "mean", "scales": TENTHS, "scored": 30}


def test_the_norm_is_the_mean_of_shares_of_the_experts(experts):
    """0.8 / 0.8 and 0.2 / 0.4 are 0.75 on average; 0.6 / 0.8 and 0.35 / 0.4 are 0.8125, at a lower mean."""
    curve = {0.2: {"a": 0.8, "b": 0.2}, 0.5: {"a": 0.6, "b": 0.35}}
    asked = []
    references = lambda split: asked.append(split) or of({"a": 0.8, "b": 0.4})  # noqa: E731
    merged = TaskArithmetic()(experts)
    assert Search([0.2, 0.5]).choose(merged, told(curve), references).merged.scale == 0.5
    assert Search([0.2, 0.5], "mean").choose(merged, told(curve), unasked).merged.scale == 0.2
    assert asked == ["val"]
    assert (
        worth(of(curve[0.5]), of({"a": 0.8, "b": 0.4})) == pytest.approx(0.8125)
        and worth(of(curve[0.5]), None) == 0.475
    )


def test_equals_are_equal_whatever_the_order_of_the_tasks(experts):
    """One image more here and one less there: no digit of a sum decides."""
    first = {"a": 0.1, "b": 0.7, "c": 0.3}
    curve = {0.2: first, 0.5: {"a": 0.3, "b": 0.1, "c": 0.7}, 0.9: {"a": 0.7, "b": 0.3, "c": 0.1}}
    for order in ([0.2, 0.5, 0.9], [0.9, 0.5, 0.2]):
        swapped = dict(zip(order, curve.values(), strict=True))
        assert Search(order, "mean").choose(TaskArithmetic()(experts), told(swapped), unasked).merged.scale == 0.2


def test_an_expert_that_gets_nothing_right_is_no_measure(experts):
    grid = told({0.2: {"a": 0.8, "b": 0.2}})
    with pytest.raises(
        UserError, match=r"divides .* on val, and for b the expert's accuracy is 0, not above 0.*criterion=mean"
    ):
        Search([0.2]).choose(TaskArithmetic()(experts), grid, lambda split: of({"a": 0.8, "b": 0.0}))
    assert not grid.asked  # nothing is scored in vain


class TestTooLong:
    @pytest.mark.parametrize("limit", [60.0, 0.0, None])
    def test_where_the_whole_list_takes_longer_it_says_so(self, experts, limit, caplog, takes):
        takes(2.1)  # 63 for all
        caplog.set_level(logging.INFO)
        curve = {scale: {"a": 1 - abs(scale - 1.4) / 3} for scale in TENTHS}
        grid = told(curve)
        chosen = Search(TENTHS, "mean", seconds=limit).choose(TaskArithmetic()(experts), grid, unasked)
        assert chosen.merged.scale == 1.4 and chosen.search["scored"] == len(grid.asked) == len(set(grid.asked))
        assert (chosen.search["scored"] == 30) == (limit is None)
        assert ("all 30 scales would take about 63 s" in caplog.text) == (limit is not None)

    def test_within_the_limit_all_are_scored(self, experts, takes):
        takes(1.9)
        grid = told({scale: {"a": 0.5} for scale in TENTHS})
        assert Search(TENTHS, "mean").choose(TaskArithmetic()(experts), grid, unasked).search["scored"] == 30

    @pytest.mark.parametrize("count", range(1, 14))
    def test_a_clean_peak_is_found_with_fewer_questions(self, count):
        for peak in range(count):
            asked = {}
            coarse(range(count), lambda some: asked.update({i: -abs(i - peak) for i in some}), asked.get)  # noqa: B023
            assert max(asked, key=asked.__getitem__) == peak and len(asked) <= count // 3 + 5

    def test_a_killed_search_does_not_decide_again(self, experts, tmp_path, takes):
        curve = {scale: {"a": 1 - abs(scale - 1.4) / 3} for scale in TENTHS}
        for seconds in (2.1, 0.0):
            takes(seconds)
            grid = told(curve)
            Search(TENTHS, "mean").choose(TaskArithmetic()(experts), grid, unasked, Journal(tmp_path))
            assert len(grid.asked) < 30

    def test_the_estimate_counts_images_workers_and_what_is_made_anew(self, suite, experts, monkeypatch):
        """By a clock that ticks once per look: an image of a batch of 8 takes 1/8, and there are 72."""
        ticks = iter(range(10))
        monkeypatch.setattr(Engine, "clock", lambda self: next(ticks))
        monkeypatch.setattr("tasks.scales.time.process_time", lambda: next(ticks))
        monkeypatch.setattr(Engine, "workers", 2)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        grid = Grid(suite, small.TOWER, Engine("cpu", batch=8))
        assert seconds_of(grid, TaskArithmetic()(experts), "val") == 72 / 8 / 2
        merged = Twin(keep=0.0)(experts)
        assert seconds_of(grid, merged, "val") == 1 / 2 + 72 / 8 / 2


def test_a_killed_search_goes_on_where_it_stopped(suite, experts, tmp_path, monkeypatch):
    grid, merged = Grid(suite, small.TOWER, Engine("cpu", batch=10)), TaskArithmetic()(experts)
    whole = grid.at_scales(merged, [0.1, 0.5], "val", Journal(tmp_path, seconds=0))
    monkeypatch.setattr("tasks.evaluate.answer", lambda *_, **__: pytest.fail("scored again"))
    assert grid.at_scales(merged, [0.1, 0.5], "val", Journal(tmp_path, seconds=0)) == whole


def test_what_has_no_scale_is_not_searched(experts, caplog):
    merged, grid = Average()(experts), told({})
    chosen = Search([0.1, 0.2]).choose(merged, grid, unasked)
    assert chosen.merged is merged and chosen.validation is None and chosen.search == {} and not caplog.text
    assert Fixed().choose(TaskArithmetic(0.7)(experts), grid, unasked).merged.scale == 0.7
    assert grid.asked == [] and Search([0.1]).source == "search:val" and Fixed().source == "fixed"
    Search([0.1, 0.2], routed=True).choose(Twin(Average())(experts), grid, unasked)
    assert "scale.routed=true changes nothing here" in caplog.text


class TestTwin:
    """Its coefficient is inside the shared expert: what lies beyond that one changes with it."""

    def test_is_searched_on_request_alone(self, suite, experts):
        merged, grid = Twin(keep=0.3)(experts), Grid(suite, small.TOWER)
        kept = Search([0.1, 0.9], "mean").choose(merged, grid, unasked)
        assert kept.merged is merged and kept.merged.scale == 0.3 and kept.validation is None
        scales = [0.1, 0.3, 0.9, 2.0]
        chosen = Search(scales, "mean", routed=True).choose(merged, grid, unasked)
        anew = {scale: Twin(TaskArithmetic(scale), keep=0.3)(experts) for scale in scales}
        means = {scale: sum(grid.score(each, "val").values.values()) for scale, each in anew.items()}
        best = max(scales, key=lambda scale: (round(means[scale], 9), -scale))
        assert chosen.merged.scale == best and chosen.validation == grid.score(anew[best], "val").scores
        assert chosen.search["scored"] == 4

    @pytest.mark.parametrize("separate", [False, True])
    def test_at_another_scale_is_the_merge_made_there(self, experts, separate):
        seen = replace(experts, separate_qkv=separate)
        moved, anew = Twin(keep=0.3)(seen).scaled(0.9), Twin(TaskArithmetic(0.9), keep=0.3)(seen)
        w = torch.tensor([0.2, 0.5, 0.3])
        assert moved.scale == anew.scale == 0.9
        assert all(torch.equal(moved.weight(key, w), anew.weight(key, w)) for key in anew.specs)
        assert not torch.equal(moved.weight("visual.proj", w), Twin(keep=0.3)(seen).weight("visual.proj", w))


def test_searching_never_opens_the_test_split(suite, experts):
    Search([0.1, 0.3]).choose(TaskArithmetic()(experts), Grid(suite, small.TOWER), perfect)
    assert [set(task.asked) for task in suite.tasks] == [{"val"}] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": []}, "scale.scales is empty"),
        ({"scales": [1], "split": "test"}, "Choose on val"),
        ({"scales": [0.1, float("nan")]}, "lists nan, which is no finite number"),
        ({"scales": [1], "criterion": "best"}, "scale.criterion='best' is unknown. Choose one of norm, mean"),
    ],
)
def test_a_search_that_would_cheat_or_try_nothing_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Search(**wrong)
