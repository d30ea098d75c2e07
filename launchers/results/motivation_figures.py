"""Figures of what DuetMerging builds on: active neurons, overlap of the tasks' masks, energy of Tucker's modes."""

import statistics
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from launchers.results.heat import COSINES, page_wide, square
from launchers.results.style import COLOURS, COLUMN, INK, PAGE, STYLES, Drawn, styled

if TYPE_CHECKING:
    from launchers.motivation import Measured

MODES = ("task", "out", "in")


def title_of(measured: "Measured") -> str:
    """What was measured, for a heading."""
    named = measured.suite if measured.family == measured.suite else f"{measured.suite} ({measured.family})"
    return f"{named}, seed {measured.seed}"


@styled
def drawings_of(measured: "Measured") -> list[Drawn]:
    """The three figures of one file of measurements."""
    return [_active(measured), _energies(measured), _overlap(measured)]


def _active(measured: "Measured") -> Drawn:
    """Tasks x blocks: share of the neurons that hold a share of the activity."""
    from pandas import DataFrame

    shares = {f"block {block}": facts["active"] for block, facts in measured.blocks.items()}
    figure, _ = page_wide([100 * DataFrame(shares, measured.tasks)], 1 if len(shares) <= 12 else 0, "FFN")
    caption = f"The fewest hidden neurons that hold {100 * measured.mass:g} % of a task's activity, of its own expert."
    return Drawn("active", "Active neurons, % of a block", figure, caption)


def _overlap(measured: "Measured") -> Drawn:
    """Task x task: Jaccard index of the masks, mean over blocks."""
    from pandas import DataFrame

    mean = np.mean([facts["overlap"] for facts in measured.blocks.values()], axis=0)
    apart = DataFrame(mean, measured.tasks, measured.tasks).where(~np.eye(len(mean), dtype=bool))
    figure = Figure(figsize=(COLUMN, COLUMN), layout="constrained")
    square(figure.subplots(), apart, COSINES, 2, "Jaccard index of the mask with that of", "mask of")
    by_block = ", ".join(f"{statistics.fmean(measured.pairs(block) or [0]):.2f}" for block in measured.blocks)
    chance = statistics.fmean(facts["chance"] for facts in measured.blocks.values())
    others = apart.stack().mean() if len(apart) > 1 else 0.0
    caption = f"Masks of {100 * measured.ratio:g} % of the neurons, mean over blocks: {others:.3f}; of random masks "
    return Drawn("overlap", "Overlap of the tasks' neurons", figure,
                 f"{caption}{chance:.3f}. From the first block to the last: {by_block}.")  # fmt: skip


def _energies(measured: "Measured") -> Drawn:
    """A panel a mode: energy that the leading directions of every FFN matrix hold, by their share of all."""
    figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
    axes = figure.subplots(1, len(MODES), sharey=True)
    kinds: dict[str, list[str]] = {}  # "visual.transformer.resblocks.3.mlp.c_fc.weight" is a "c_fc"
    for key in measured.matrices:
        kinds.setdefault(key.removesuffix(".weight").rpartition(".")[2], []).append(key)
    for ax, mode in zip(axes, MODES, strict=True):
        for dashes, (kind, keys) in zip(STYLES * len(kinds), kinds.items(), strict=False):
            for place, key in enumerate(keys):
                curve = measured.matrices[key]["modes"][mode]
                at = 100 * np.array([0, *curve["ranks"]]) / curve["ranks"][-1]
                colour = COLOURS(0.9 * place / max(1, len(keys) - 1))
                ax.plot(at, 100 * np.array([0, *curve["energy"]]), dashes, color=colour, lw=0.9,
                        label=kind if place == 0 else None)  # fmt: skip
        ax.plot([0, 100], [0, 100], color=INK, lw=0.6, ls=":", label="flat")
        ax.set(xlabel=f"{mode} rank, % of the full one", xlim=(0, 100), ylim=(0, 102))
        ax.grid(True)
    axes[0].set_ylabel("energy held, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds) + 1)
    caption = (
        "A line an FFN matrix, blue in the first block to yellow in the last. On the dotted line no direction matters "
    )
    return Drawn("spectra", "Energy of Tucker's modes, %", figure,
                 f"{caption}more than another, and a smaller rank loses in proportion.")  # fmt: skip
