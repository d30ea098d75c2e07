"""The published numbers are consistent with themselves, with each other and with the data sets."""

import statistics
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from repeated import KNOWN, SUITES, names, published_row

from launchers.results.published import _about, method_of
from tasks.text.glue import facts as glue
from tasks.vision.dataset_registry import VARIANTS, facts

CONF = Path(__file__).parents[2] / "conf"
CELLS = [(row, task) for row in KNOWN for task in row.accuracy]


def test_the_printed_mean_is_the_mean_of_the_cells_or_a_told_misprint():
    checked = [row for row in KNOWN if row.accuracy and row.printed_mean]
    for row in checked:
        half_units = 10**-row.digits  # half of the last digit of the cells and half of that of the mean
        fits = abs(statistics.fmean(row.accuracy.values()) - (row.printed_mean or 0)) <= half_units + 1e-9
        assert fits != row.misprint, names(row)
        assert not row.misprint or any(f"{row.printed_mean:g}" in note for note in row.notes), names(row)
    assert len(checked) > 100


def test_every_exact_accuracy_is_a_whole_number_of_the_test_images():
    wrong = {
        (names(row), task): row.accuracy[task]
        for row, task in CELLS
        if row.digits == 3
        and (row.suite, task) != ("t5_glue8", "stsb")  # a correlation
        and abs(100 * round(row.accuracy[task] / 100 * row.test_images[task]) / row.test_images[task]
                - row.accuracy[task]) > 0.00051
    }  # fmt: skip
    assert not wrong


def misses(table, task, images, backbone="clip_vit_b32"):
    """Accuracies of a table that no count of `images` gives."""
    values = [row.accuracy[task] for row in KNOWN if (row.table, row.backbone) == (table, backbone)]
    return [value for value in values if abs(100 * round(value / 100 * images) / images - value) > 0.00051]


def test_other_sizes_of_the_disputed_test_sets_do_not_fit():
    """The check above can fail: the sizes that differ between code bases are told apart by the numbers."""
    assert misses("TSV logs", "EuroSAT", 2700) and not misses("TSV logs", "EuroSAT", 21600)
    assert misses("EMR logs", "SUN397", 19850) and not misses("EMR logs", "SUN397", 19887)
    assert misses("LiNeS zero-shot", "EuroSAT", 2700) and not misses("LiNeS zero-shot", "EuroSAT", 2387)
    assert misses("OPCM logs", "SUN397", 19887) and misses("OPCM logs", "EuroSAT", 2387)


def test_test_images_are_those_of_the_data_sets():
    own = {"EuroSAT", "SUN397"}  # folders of their own in several code bases
    for row, task in CELLS:
        if row.variant is None:
            sizes = glue()["tasks"][task]["sizes"]["test"]
            assert row.test_images[task] == (min(1001, sizes) if row.suite == "glue8" else sizes), (names(row), task)
        elif row.test_images and task not in own:
            assert row.test_images[task] == facts(task, row.variant).sizes["test"], (names(row), task)
    assert {row.variant for row in KNOWN} - {None} <= set(VARIANTS)


@pytest.mark.parametrize(("backbone", "zero_shot", "experts"),
                         [("b32", 48.081, 90.38), ("b16", 55.36, 92.376), ("l14", 64.925, 94.303)])  # fmt: skip
def test_the_first_eight_of_twenty_tasks_average_to_the_published_eight(backbone, zero_shot, experts):
    for method, expected in (("base", zero_shot), ("expert", experts)):
        row = published_row("OPCM logs", method, f"clip_vit_{backbone}", "clip20")
        part = row.on("clip8", SUITES["clip8"])
        assert part is not None and part.mean == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(("method", "backbone"), product(("average", "task_arithmetic", "ties"), ("b32", "l14")))
def test_two_generations_differ_by_eurosat(method, backbone):
    older, later = (published_row(table, method, f"clip_vit_{backbone}")
                    for table in ("fusion_bench docs", "RankOne-MoE logs"))  # fmt: skip
    gaps = {task: older.accuracy[task] - later.accuracy[task] for task in SUITES["clip8"]}
    assert 0.9 < gaps.pop("EuroSAT") < 3.5 and all(abs(gap) <= 0.55 for gap in gaps.values())


def test_the_leak_shows_in_dtd_alone():
    leaky, clean = (published_row(table, "expert", suite="clip20") for table in ("tall_masks logs", "LiNeS logs"))
    gaps = {task: leaky.accuracy[task] - clean.accuracy[task] for task in leaky.accuracy}
    assert gaps.pop("DTD") > 15 and all(abs(gap) < 1.5 for gap in gaps.values())
    assert all(any("DTD" in note for note in row.notes) for row in KNOWN if row.family == "tall_masks_v1")


def knobs(config, prefix=""):
    """Dotted names of a composed part."""
    return {name for key, value in config.items() for name in
            ({f"{prefix}{key}"} | (knobs(value, f"{prefix}{key}.") if isinstance(value, dict) else set()))}  # fmt: skip


@cache
def knobs_with(method):
    """Dotted names of everything that a run of the method may set."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [f"method={method}", "router=entropy"])
    return knobs(OmegaConf.to_container(config, resolve=False))


ROUTERS = {"none", "oracle", "subspace", "task_id", "entropy"}


def has_scale(method):
    """Whether a coefficient is part of the method: of what is merged statically, or around the routed parts."""
    if OmegaConf.load(CONF / "method" / f"{method}.yaml").get("scale", 1.0) is None:
        return False
    return bool({"method.scale", "method.rest.scale", "method.shared.scale", "method.then.scale"} & knobs_with(method))


def test_presets_of_ours_are_a_published_method_with_other_values():
    for preset, method in _about()["presets"].items():
        own, published = (OmegaConf.load(CONF / "method" / f"{name}.yaml") for name in (preset, method))
        assert own.defaults[0] == method and "_target_" in published and method_of(preset) == method
    assert method_of("twin_pretrain") == "twin_pretrain" and method_of("duet_svd") == "duet_svd"


def test_methods_and_settings_are_ours():
    experts = {"experts.qkv", "experts.text", "experts.owned"}  # of the Hub's, the pickled and the language families
    for row in KNOWN:
        assert (CONF / "method" / f"{row.method}.yaml").exists() and row.suite in SUITES, names(row)
        assert (CONF / "backbone" / f"{row.backbone}.yaml").exists(), names(row)
        dotted = {name for name in row.settings if "." in name}
        assert set(row.settings) - dotted <= {"scale", "router", "adaptation", "granularity"}, names(row)
        dotted -= {"search.criterion", "search.scales"}
        assert dotted - experts <= knobs_with(row.method), names(row)
        assert {"router", "adaptation"} <= set(row.settings) and row.settings["router"] in ROUTERS, names(row)
        assert ("scale" in row.settings) == has_scale(row.method), names(row)
        assert len(row.table) <= 26 and row.source and row.tolerance > 0


EXPERIMENTS = {
    "duet_table1": "DuetMerging, Table 1",
    "duet_table3": "DuetMerging, Table 3",
    "duet_table4": "DuetMerging, Table 4",
    "twin_table3": "Twin-Merging, Table 3",
    "clip8_static": "subspace_fusion sweep",
    "clip20_static": "fusion_bench TSV-M",
}


@pytest.mark.parametrize(("experiment", "table"), [("twin_table2_glue", "Table 8"), ("twin_table8", "Table 8"),
                                                   ("twin_table6", "Table 6")])  # fmt: skip
def test_experiments_of_glue_run_every_row_of_their_table_by_its_protocol(experiment, table):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [f"experiment={experiment}"], True)
    swept = config.hydra.sweeper.params.method.split(",")
    rows = [row for row in KNOWN if row.table == f"Twin-Merging, {table}"]
    assert {row.method for row in rows} <= set(map(method_of, swept)) and len(set(swept)) == len(swept)
    assert all((CONF / "method" / f"{method}.yaml").exists() for method in swept)
    assert {config.experts.owned} == {row.settings["experts.owned"] for row in rows if row.method != "base"}
    assert (config.backbone.name, config.suite.name, config.experts.family) == ("roberta_base", "glue8", "glue_roberta")
    assert config.suite.first == max(rows[0].test_images.values())


@pytest.mark.parametrize(("experiment", "backbone"), product(EXPERIMENTS, ("b32", "l14")))
def test_an_experiment_runs_every_published_row_of_its_table(experiment, backbone):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [f"experiment={experiment}", f"backbone=clip_vit_{backbone}"], True)
    swept = config.hydra.sweeper.params.method.split(",")
    assert {row.method for row in KNOWN if row.table == EXPERIMENTS[experiment]} <= set(map(method_of, swept))
    assert len(set(swept)) == len(swept) and all((CONF / "method" / f"{each}.yaml").exists() for each in swept)
    assert config.backbone.name == f"clip_vit_{backbone}" and config.hydra.mode.name == "MULTIRUN"
    assert config.suite.name in (experiment.split("_")[0], "clip8") and config.suite.variant == "fusion_bench"
