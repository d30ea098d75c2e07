"""Figures of what DuetMerging builds on: active neurons, overlap of the tasks' masks, energy of Tucker's modes."""

import statistics
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from launchers.results.heat import ROW, SCORES, Panel, maps, off_diagonal, square
from launchers.results.style import COLOURS, INK, PAGE, STYLES, Drawn, styled

if TYPE_CHECKING:
    from launchers.motivation import Measured


def title_of(measured: "Measured") -> str:
    """What was measured, for a heading."""
    named = measured.suite if measured.family == measured.suite else f"{measured.suite} ({measured.family})"
    return f"{named}, seed {measured.seed}"


@styled
def drawings_of(measured: "Measured") -> list[Drawn]:
    """The three figures of one file of measurements."""
    from pandas import DataFrame

    blocks, tasks = measured.blocks, measured.tasks
    active = 100 * DataFrame({f"block {block}": facts["active"] for block, facts in blocks.items()}, tasks)
    figure, _ = maps([Panel("", active)], SCORES, 1 if len(blocks) <= 12 else 0, "FFN", high=ROW)
    caption = f"The fewest hidden neurons that hold {100 * measured.mass:g} % of a task's activity, of its own expert."
    neurons = Drawn("active", "Active neurons, % of a block", figure, caption)

    apart = off_diagonal(DataFrame(np.mean([facts["overlap"] for facts in blocks.values()], axis=0), tasks, tasks))
    figure = square(apart, 2, "Jaccard index of the mask with that of", "mask of")
    by_block = ", ".join(f"{statistics.fmean(measured.pairs(block) or [0]):.2f}" for block in blocks)
    chance = statistics.fmean(facts["chance"] for facts in blocks.values())
    others = apart.stack().mean() if len(apart) > 1 else 0.0
    caption = (
        f"Masks of {100 * measured.ratio:g} % of the neurons, mean over blocks: {others:.3f}; of random masks "
        f"{chance:.3f}. From the first block to the last: {by_block}."
    )
    overlap = Drawn("overlap", "Overlap of the tasks' neurons", figure, caption)
    return [neurons, _spectra(measured), overlap]


def _spectra(measured: "Measured") -> Drawn:
    """A panel a mode: energy that the leading directions of every FFN matrix hold, by their share of all."""
    figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    kinds: dict[str, list[str]] = {}  # "visual.transformer.resblocks.3.mlp.c_fc.weight" is a "c_fc"
    for key in measured.matrices:
        kinds.setdefault(key.removesuffix(".weight").rpartition(".")[2], []).append(key)
    for ax, mode in zip(axes, ("task", "out", "in"), strict=True):
        for dashes, (kind, keys) in zip(STYLES * len(kinds), kinds.items(), strict=False):
            for depth, key in enumerate(keys):
                curve = measured.matrices[key]["modes"][mode]
                ranks, energy = (100 * np.array([0, *curve[name]]) for name in ("ranks", "energy"))
                ax.plot(ranks / curve["ranks"][-1], energy, dashes, color=COLOURS(0.9 * depth / max(1, len(keys) - 1)),
                        lw=0.9, label="_" if depth else kind)  # fmt: skip
        ax.plot([0, 100], [0, 100], color=INK, lw=0.6, ls=":", label="flat")
        ax.set(xlabel=f"{mode} rank, % of the full one", xlim=(0, 100), ylim=(0, 102))
        ax.grid(True)
    axes[0].set_ylabel("energy held, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds) + 1)
    caption = (
        "A line an FFN matrix, blue in the first block to yellow in the last. On the dotted line no direction matters "
        "more than another, and a smaller rank loses in proportion."
    )
    return Drawn("spectra", "Energy of Tucker's modes, %", figure, caption)
