"""Figures of what DuetMerging builds on: active neurons, overlap of the tasks' masks, energy of Tucker's modes."""

import statistics

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launchers.motivation import Measured
from launchers.results.plots import COLOURS
from launchers.results.report.maps import SPAN, cells, paint
from launchers.results.report.squares import ALIKE, READABLE, name_ticks
from launchers.results.report.style import COLUMN, INK, PAGE, STYLES, TEXT, Drawn, styled

MODES = ("task", "out", "in")


def drawings(found: Measured) -> list[Drawn]:
    """The three figures of one file of measurements."""
    return [active_map(found), energy_curves(found), overlap_map(found)]


def title(found: Measured) -> str:
    """What was measured, for a heading."""
    named = found.suite if found.family == found.suite else f"{found.suite} ({found.family})"
    return f"{named}, seed {found.seed}"


@styled
def active_map(found: Measured) -> Drawn:
    """Tasks x blocks: share of the neurons that hold a share of the activity."""
    values = 100 * np.array([each["active"] for each in found.blocks.values()]).T
    columns = [f"block {block}" for block in found.blocks]
    figure, ax = cells(values, found.tasks, columns, SPAN, 1 if len(columns) <= 12 else 0)
    ax.set_xlabel("FFN", loc="left")
    told = f"The fewest hidden neurons that hold {100 * found.mass:g} % of a task's summed activity, of its own expert."
    return Drawn(f"active-{found.run_id}", "Active neurons, % of a block", figure, told, PAGE)


@styled
def overlap_map(found: Measured) -> Drawn:
    """Task x task: Jaccard index of the masks, mean over blocks."""
    count, apart = len(found.tasks), ~np.eye(len(found.tasks), dtype=bool)
    overlap = np.mean([each["overlap"] for each in found.blocks.values()], axis=0)
    others = overlap[apart] if count > 1 else np.zeros(1)
    figure = Figure(figsize=(COLUMN, COLUMN), layout="constrained")
    ax = figure.subplots()
    fits = count <= READABLE
    scale = Normalize(0, max(ALIKE, others.max()))
    paint(ax, np.where(apart, overlap, np.nan), scale, 2 if fits else None, TEXT - 1 if count <= 9 else TEXT - 2)
    name_ticks(ax, found.tasks)
    ax.set_aspect("equal")
    ax.set(xlabel="Jaccard index of the mask with that of", ylabel="mask of")
    if not fits:
        figure.colorbar(ax.collections[0], ax=ax, shrink=0.6)
    by_block = ", ".join(f"{statistics.fmean(found.pairs(block) or [0]):.2f}" for block in found.blocks)
    chance = statistics.fmean(each["chance"] for each in found.blocks.values())
    told = f"Masks of {100 * found.ratio:g} % of the neurons, mean over blocks: {others.mean():.3f}; of random masks "
    told += f"{chance:.3f}. From the first block to the last: {by_block}."
    return Drawn(f"overlap-{found.run_id}", "Overlap of the tasks' neurons", figure, told, COLUMN)


@styled
def energy_curves(found: Measured) -> Drawn:
    """A panel a mode: energy that the leading directions of every FFN matrix hold, by their share of all."""
    figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
    axes = figure.subplots(1, len(MODES), sharey=True)
    kinds = list(dict.fromkeys(_kind(key) for key in found.matrices))
    depth = {kind: [key for key in found.matrices if _kind(key) == kind] for kind in kinds}
    for ax, mode in zip(axes, MODES, strict=True):
        for number, (kind, keys) in enumerate(depth.items()):
            for place, key in enumerate(keys):
                curve = found.matrices[key]["modes"][mode]
                at = 100 * np.array([0, *curve["ranks"]]) / curve["ranks"][-1]
                look = {
                    "color": COLOURS(0.9 * place / max(1, len(keys) - 1)),
                    "ls": STYLES[number % 2],
                    "lw": 0.9,
                }
                shown = kind if place == 0 and mode == MODES[0] else None
                ax.plot(at, 100 * np.array([0, *curve["energy"]]), label=shown, **look)
        ax.plot([0, 100], [0, 100], color=INK, lw=0.6, ls=":", label="flat" if mode == MODES[0] else None)
        ax.set(xlabel=f"{mode} rank, % of the full one", xlim=(0, 100), ylim=(0, 102))
        ax.grid(True)
    axes[0].set_ylabel("energy held, %")
    figure.legend(loc="outside upper center", ncols=len(kinds) + 1)
    told = (
        "A line an FFN matrix, blue in the first block to yellow in the last. On the dotted line no direction matters "
    )
    told += "more than another, and a smaller rank loses in proportion."
    return Drawn(f"spectra-{found.run_id}", "Energy of Tucker's modes, %", figure, told, PAGE)


def _kind(key: str) -> str:
    """ "visual.transformer.resblocks.3.mlp.c_fc.weight" is "c_fc"."""
    return key.removesuffix(".weight").rpartition(".")[2]
