"""How figures look: paper sizes, colours for every vision, and as SVG that follows the page's theme."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from merging.errors import UserError
from merging.files import write_atomically

PAGE, COLUMN = 6.75, 3.25  # inches: the text width of a paper in two columns, and one column
TEXT = 7  # points
INK, RULE, MISSING = "#1b1c1e", "#d3d4d6", "#fdfdfc"  # become the page's own colours
THEME = {INK: "currentColor", RULE: "var(--rule)", MISSING: "var(--page)"}
COLOURS = colormaps["cividis"]  # reads the same with every common colour vision, and in grey
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # distinct to every colour vision
MARKERS = "osD^vPX"
STYLES = ("-", "--", "-.", ":")
NAME = 34  # characters of a line's name in a figure
KIND_COLOURS = {"static": OKABE_ITO[0], "routed": OKABE_ITO[1], "oracle": OKABE_ITO[2],
                **dict.fromkeys(("base", "linear_probe", "multitask", "expert"), INK)}  # fmt: skip
MEASURES = {
    "norm": "normalised score, %",
    "mean": "mean score, %",
    "routing_accuracy": "routing accuracy, %",
    "energy": "energy kept, %",
}
styled = rc_context(fname=str(Path(__file__).parent / "page" / "figures.mplstyle"))  # decorates what draws


@dataclass(frozen=True)
class Drawn:
    """A figure with what stands around it."""

    name: str  # of its file, unique within its suite
    title: str
    figure: Figure
    caption: str = ""
    tips: Mapping[str, str] = field(default_factory=dict)  # gid of an artist -> what a pointer over it reads

    @property
    def width(self) -> float:
        """In inches."""
        return self.figure.get_figwidth()

    @styled
    def write(self, path: Path, dpi: int = 300) -> Path:
        """Write it in the format that the path ends with. Raises UserError for one that there is not."""
        if path.suffix[1:] not in (known := self.figure.canvas.get_supported_filetypes()):
            raise UserError(f"{path} names no format of a picture. End it in one of .{', .'.join(sorted(known))}.")
        settle(self.figure)
        stamp = {"CreationDate": None} if path.suffix == ".pdf" else {}
        save = self.figure.savefig
        return write_atomically(path, lambda file: save(file, format=path.suffix[1:], dpi=dpi, metadata=stamp))

    @styled
    def svg(self, prefix: str) -> str:
        """An `<svg>` element: ids begin with `prefix`, colours of text and rules are the page's own."""
        settle(self.figure)
        file = io.StringIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
        svg = re.sub(r'(\bid="|\bxlink:href="#|url\(#)', rf"\1{prefix}-", svg).replace("xlink:href", "href")
        for colour, variable in THEME.items():
            svg = svg.replace(colour, variable)
        svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
        for gid, tip in self.tips.items():
            svg = svg.replace(f'<g id="{prefix}-{gid}">', f'<g id="{prefix}-{gid}"><title>{escape(tip)}</title>')
        width, height = self.figure.get_size_inches() * 96
        head = f'<svg role="img" aria-label="{escape(self.title)}" viewBox="0 0 {width * 0.75:g} {height * 0.75:g}"'
        _, _, inside = svg.partition("<svg")[2].partition(">")
        return f'{head} width="{width:.0f}" height="{height:.0f}">{inside}'


def settle(figure: Figure) -> None:
    """Give everything its place once: every format would else work it out again by drawing the figure twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def named(line: Any) -> str:
    """The name of a line of a summary and what a routed or oracle one is; a long one is cut, its number behind it."""
    name = line.label if len(line.label) <= NAME else f"{line.label[: NAME - 8].rstrip()}... [{line.Index}]"
    return f"{name} ({line.kind})" if line.kind in ("routed", "oracle") else name
