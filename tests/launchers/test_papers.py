"""What a file of conf/ says of a paper or its code is what it composes to."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cells import make_row
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from repeated import KNOWN, published_row

from launchers.results.against import routed_by
from launchers.results.published import method_of
from merging.fit.gates import Gradient, Learned, TaskId
from merging.methods import Smile, Twin
from merging.routing.gates import GateShape

RUN_LEVEL = ("scale", "router", "adaptation", "granularity")  # settings that are no place in the configuration


@cache
def composed(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def asked(config, name):
    """The value at a dotted place."""
    return OmegaConf.select(config, name, throw_on_missing=True)


def differing(there, *overrides):
    """Where a command line differs from a published row, places of the configuration alone."""
    config = composed(f"backbone={there.backbone}", *overrides)
    wanted = {name: value for name, value in there.settings.items() if name not in RUN_LEVEL and value != "unknown"}
    return {name: (value, asked(config, name)) for name, value in wanted.items() if asked(config, name) != value}


STATIC = ("average", "task_arithmetic", "ties", "dare", "tsv_m")


@pytest.mark.parametrize("table", ["RankOne-MoE logs", "fusion_bench docs", "fusion_bench TSV-M"])
def test_static_methods_run_at_the_published_coefficients(table):
    """clip8_static, without its Iso-C and Iso-CTS: the command in the file sets their 1.5."""
    rows = [row for row in KNOWN if (row.table, row.suite) == (table, "clip8") and row.method in STATIC]
    for there in rows:
        overrides = ("experiment=clip8_static", f"method={there.method}")
        assert differing(there, *overrides) == {}
        config = composed(f"backbone={there.backbone}", *overrides)
        scale = config.method.get("scale", config.method.get("then", {}).get("scale"))
        assert scale == there.settings.get("scale") and config.scale._target_.endswith(".Fixed")
    assert rows
    iso = composed("experiment=clip8_static", "method=iso_c", "method.scale=1.5")
    assert iso.method.scale == published_row("fusion_bench docs", "iso_c").settings["scale"]


@pytest.mark.parametrize(("experiment", "family"), [
    ("t5_glue8_static", "t5_glue"), ("t5_glue8_lora", "t5_glue_lora"), ("t5_glue8_lora", "t5_large_glue_lora"),
])  # fmt: skip
def test_t5_runs_every_published_row_of_its_family_at_its_coefficient(experiment, family):
    rows = [row for row in KNOWN if row.family == family and row.table.startswith("fusion_bench docs")]
    swept = composed(f"experiment={experiment}").hydra.sweeper.params.method.split(",")
    assert {row.method for row in rows} == {"base", "expert", "average", "task_arithmetic", "ties"} <= set(swept)
    for there in rows:
        overrides = (f"experiment={experiment}", f"experts={family}", f"method={there.method}")
        assert differing(there, *overrides) == {}
        config = composed(f"backbone={there.backbone}", *overrides)
        assert config.method.get("scale") == there.settings.get("scale") and config.scale._target_.endswith(".Fixed")
        assert (config.suite.name, config.suite.first, config.experts.family) == ("t5_glue8", None, family)


def test_the_smile_of_duets_table_has_the_rank_of_its_number():
    swept = composed("experiment=duet_table1").hydra.sweeper.params.method.split(",")
    (smile,) = (name for name in swept if method_of(name) == "smile")
    made = instantiate(composed("experiment=duet_table1", f"method={smile}").method)
    assert made == Smile(rank=128, gate_rank=16, top_k=1, split_qkv=True)
    (quoted,) = (row for row in KNOWN if row.table == "DuetMerging, Table 1" and row.method == "smile"
                 and row.backbone == "clip_vit_b32")  # fmt: skip
    source = published_row("fusion_bench SMILE", "smile", printed="gate_k=16 k=128")
    assert quoted.printed_mean == source.printed_mean == 89.3
    assert differing(source, "experiment=duet_table1", f"method={smile}") == {}
    assert differing(source, "experiment=duet_table1", "method=smile") == {"method.rank": (128, 32)}


def test_twins_table_routes_everything_by_the_papers_router():
    swept = composed("experiment=twin_table3").hydra.sweeper.params.method.split(",")
    (twin,) = (name for name in swept if method_of(name) == "twin")
    there = published_row("Twin-Merging, Table 3", "twin")
    assert differing(there, "experiment=twin_table3", f"method={twin}") == {}
    config = composed("experiment=twin_table3", f"method={twin}")
    assert instantiate(config.method, _convert_="all") == Twin(start=None)
    assert instantiate(config.router, _convert_="all") == Learned(
        "twin", GateShape("pass", 3, "mean", standardise=False), TaskId(400, 256, 5e-4, 0.0)
    )


ENTROPY = Gradient(steps=1000, batch=16, lr=1e-4, schedule="constant")
WEMOE = GateShape("block", 2, "mean", "after", activation="none", granularity="batch", standardise=False)


@pytest.mark.parametrize(("method", "more"), [
    ("wemoe", ()),
    ("e_wemoe", ("router.gate.shared=true",)),
])  # fmt: skip
def test_the_transductive_router_is_fusion_benchs(method, more):
    there = published_row("fusion_bench docs", method)
    overrides = (
        "experiment=clip8_dynamic",
        f"method={method}",
        "router=entropy_transductive",
        "engine.batch=128",
        *more,
    )
    assert differing(there, *overrides) == {}
    router = instantiate(composed(*overrides).router, _convert_="all")
    assert router.train == ENTROPY and router.split == there.settings["adaptation"] == "test"
    assert router.gate.granularity == there.settings["granularity"] == "batch"
    if not more:
        assert router.gate == WEMOE


def test_the_first_release_of_wemoe_is_two_options_away():
    there = published_row("WEMoE logs", "wemoe", printed="WEMoE router lr=1e-4, step 1000")
    overrides = ("experiment=clip8_dynamic", "method=wemoe", "router=entropy_transductive",
                 "router.gate.granularity=sample", "router.train.schedule=cosine")  # fmt: skip
    assert differing(there, *overrides) == {}


def test_the_rank_one_gate_is_the_published_one_with_what_its_file_says():
    there = published_row("RankOne-MoE logs", "rank_one_moe", printed="rankone_wemoe_rank_32_select_factor_0_75")
    overrides = ("experiment=clip8_dynamic", "method=rank_one_moe", "router=rank_one")
    published = ("router.split=test", "router.gate.granularity=batch", "router.gate.standardise=false",
                 "router.train.schedule=constant", "engine.batch=128")  # fmt: skip
    assert differing(there, *overrides, *published) == {}
    assert set(differing(there, *overrides)) == {
        "router.gate.standardise", "router.train.schedule", "engine.batch"
    }  # fmt: skip


@pytest.mark.parametrize(("router", "kind"), [
    ("entropy", "entropy"), ("entropy_transductive", "entropy"), ("rank_one", "entropy"), ("entropy_global",
    "entropy + marginal"), ("distillation", "distillation"), ("task_id_entropy", "task_id + entropy"),
    ("task_id", "task_id"), ("twin", "task_id"), ("retrieval", "retrieval"),
    ("retrieval router.train.rank=32", "retrieval + metric"),
])  # fmt: skip
def test_what_gates_learn_from_is_read_off_their_configuration(router, kind):
    config: Any = OmegaConf.to_container(composed(*f"router={router}".split()), resolve=False)
    assert routed_by(replace(make_row(), router=router, config=config)) == kind
