"""How figures look: paper sizes, colours for every vision, and as SVG that follows the page's theme."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

PAGE, COLUMN = 6.75, 3.25  # inches: the text width of a paper in two columns, and one column
TEXT = 7  # points
INK, RULE, MISSING = "#1b1c1e", "#d3d4d6", "#fdfdfc"  # become the page's own colours
COLOURS = colormaps["cividis"]  # reads the same with every common colour vision, and in grey
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # distinct to every colour vision
MARKERS = "osD^vPX"
STYLES = ("-", "--", "-.", ":")
NAME = 34  # characters of a line's name in a figure
KIND_NAMES = {"base": "base", "static": "static", "routed": "routed per input",
              "oracle": "oracle (task identity given)", "multitask": "one model trained on all",
              "expert": "experts"}  # fmt: skip
LOOKS = {kind: (marker, colour) for kind, marker, colour in
         zip(KIND_NAMES, "Xos^vP", (INK, *OKABE_ITO[:3], INK, INK), strict=True)}  # fmt: skip
MEASURES = {
    "norm": "mean accuracy, % of the experts'",
    "mean": "mean accuracy, %",
    "unseen": "mean accuracy on unseen tasks, %",
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


def named(label: str, number: int, more: str = "") -> str:
    """A line's name; a long one is cut and carries its number in the table."""
    if len(label) <= NAME:
        return label + more
    return f"{label[: NAME - 8].rstrip()}... [{number}]{more}"


def settle(figure: Figure) -> None:
    """Give everything its place once: every format would else work it out again by drawing the figure twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


@styled
def save(drawn: Drawn, kind: str, dpi: int = 300) -> bytes:
    """The figure as a "pdf" or "png" file."""
    settle(drawn.figure)
    file = io.BytesIO()
    stamp = {"CreationDate": None} if kind == "pdf" else {}
    drawn.figure.savefig(file, format=kind, dpi=dpi, metadata=stamp)
    return file.getvalue()


@styled
def inline_svg(drawn: Drawn, prefix: str) -> str:
    """The figure as an `<svg>` element: ids begin with `prefix`, colours of text and rules are the page's own."""
    settle(drawn.figure)
    file = io.StringIO()
    drawn.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|\bxlink:href="#|url\(#)', rf"\1{prefix}-", svg).replace("xlink:href", "href")
    for colour, own in ((INK, "currentColor"), (RULE, "var(--rule)"), (MISSING, "var(--page)")):
        svg = svg.replace(colour, own)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for gid, tip in drawn.tips.items():
        svg = svg.replace(f'<g id="{prefix}-{gid}">', f'<g id="{prefix}-{gid}"><title>{escape(tip)}</title>')
    width, height = drawn.figure.get_size_inches() * 96
    head = f'<svg role="img" aria-label="{escape(drawn.title)}" viewBox="0 0 {width * 0.75:g} {height * 0.75:g}"'
    return head + f' width="{width:.0f}" height="{height:.0f}">' + svg[svg.index(">") + 1 :]
