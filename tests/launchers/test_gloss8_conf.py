"""Prepared ablations on gloss8: the suite brings its backbone and its experts, unless others are named."""

import pytest
from hydra.utils import get_method

from launchers.job import built
from tasks.text import minilm
from tests.launchers.test_conf import composed

ABLATIONS = ["task_rank", "bytes_duet", "bytes_twin", "mask_scaling", "router_losses", "granularity"]


def targets(config):
    return [config[part]._target_ for part in ("backbone", "experts", "suite")]


@pytest.mark.parametrize("experiment", ABLATIONS)
def test_an_ablation_runs_on_gloss8_with_one_override(experiment):
    plain, config = composed(f"experiment={experiment}"), composed(f"experiment={experiment}", "suite=gloss8")
    assert targets(config) == targets(composed("experiment=gloss8"))
    assert get_method(config.backbone._target_) is minilm.backbone
    assert built(config) == built(plain)
    assert config.hydra.sweeper.params == plain.hydra.sweeper.params


def test_other_experts_are_taken_where_they_are_named():
    config = composed("suite=gloss8", "experts=folder", "backbone=mini_clip")
    assert targets(config)[:2] == targets(composed("experts=folder", "backbone=mini_clip"))[:2]


def test_smol4_brings_its_decoder_and_scores_every_prompt_at_ten_coefficients():
    config = composed("suite=smol4")
    assert targets(config) == targets(composed("backbone=smollm2", "experts=smol4", "suite=smol4"))
    scale = composed("experiment=smol4").scale
    assert len(scale.scales) == 10 and scale.seconds is None


@pytest.mark.parametrize("experiment", ["gloss8", "smol4"])
def test_a_seed_of_the_comparison_is_done_before_the_next(experiment):
    params = composed(f"experiment={experiment}").hydra.sweeper.params
    assert [*params] == ["seed", "method"] and "expert" in params.method and params.seed == "0,1"
