"""A mistyped key is answered with what exists there."""

import pytest

from launchers.cli_help import hint, reaching


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["suite=none", "experts.base=a", "experts.paths=[b]", "method=ties", "method.densty=0.1"],
            "There is no method.densty. Did you mean density?",
        ),
        (["sede=1"], "There is no sede. Did you mean seed? The configuration has: "),
        (["method=ties", "method.densty=0.1"], "There is no method.densty. Did you mean density? method has: density,"),
        (["suite.sizes.tran=3"], "There is no suite.sizes.tran. Did you mean train? suite.sizes has: train, val,"),
        (["-m", "method=dare", "method.then.scal=1"], "There is no method.then.scal. Did you mean scale?"),
        (
            ["method=dare", "method@method.then=ties", "method.then.merg=1"],
            "There is no method.then.merg. Did you mean merge?",
        ),
        (["scale=fixed", "scale.scales=[1]"], "There is no scale.scales. scale has none."),
        (["method=ties,tsv_m", "method.densty=0.1"], "There is no method.densty. Did you mean density?"),
        (["router.gate.sess=early"], "There is no router.gate.sess. Did you mean sees? router.gate has: "),
        (["router=oracle", "router.gate.sees=early"], "There is no router.gate. router has: "),
        (["method=duet", "method.ranks.vaule=3"], "There is no method.ranks.vaule. Did you mean value?"),
        (["experiment=seeds", "sede=1"], "There is no sede. Did you mean seed? The configuration has: "),
        (
            ["-m", "experiment=granularity,task_rank", "method.unti=block"],
            "There is no method.unti. Did you mean unit?",
        ),
        (["method=tise"], "There is no method=tise. Did you mean ties? method has: ada_merging, "),
        (["zzz.y=1", "seed=2"], "There is no zzz. The configuration has: "),
    ],
)
def test_the_nearest_name_is_told_with_all_there_are(arguments, answer):
    advice = hint(arguments)
    assert advice is not None and advice.startswith(answer)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["seed=1", "method=ties", "method.density=0.1,0.2", "suite.tasks=[cars]"],
        ["+new=1", "++method.new=2", "hydra.run.dir=x", "method@method.then=ties", "tracker=wandb", "tracker.tags=[a]"],
        ["experiment=seeds", "seed=1", "hydra/launcher=basic"],
        ["seed=[1"],  # Hydra names what it cannot read
    ],
)
def test_what_exists_needs_no_hint(arguments):
    assert hint(arguments) is None


@pytest.mark.parametrize(
    ("arguments", "reached"),
    [
        ("-m method=ties,sce method.density=0.5 seed=0,1", "-m method=ties,sce ++method.density=0.5 seed=0,1"),
        ("-m method=ties,sce method.density=0.5,0.6", "-m method=ties,sce method.density=0.5,0.6"),
        ("-m method=ties,sce method.densty=0.5", "-m method=ties,sce method.densty=0.5"),  # which Hydra refuses
        ("method=ties method.density=0.5", "method=ties method.density=0.5"),
        ("-m router=oracle,task_id router.x=[1", "-m router=oracle,task_id router.x=[1"),
    ],
)
def test_options_reach_the_methods_of_a_sweep(arguments, reached):
    assert " ".join(reaching(arguments.split())) == reached
