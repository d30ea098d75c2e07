"""Rows for the tests of the report, and its page read back as a tree."""

import os
import shutil
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser

from cells import failed_row, make_row, routed_row

from launchers import report
from launchers.results.frame import summarise

KNOBS = (4, 8, 16, 64)
SCRIPT = "<script>alert('&')</script>"


def many_rows():
    """What a real folder holds: references, static, routed and oracle lines, two seeds, a curve and a failure."""
    alike = [[1.0 if one == other else 0.02 * (one + other) - 0.01 for other in range(8)] for one in range(8)]
    made = []
    for seed in (0, 1):
        up = seed / 50
        made += [
            make_row("base", 0.3, seed=seed, stored_bytes=10_000_000),
            make_row("expert", 0.9, seed=seed, stored_bytes=90_000_000, similarity=alike),
            make_row("average", 0.5 + up, seed=seed, stored_bytes=10_000_000),
            make_row("ties", 0.7 - up, seed=seed, stored_bytes=10_000_000),
            routed_row("twin", 0.85, seed=seed, stored_bytes=30_000_000),
            routed_row("smile", 0.75, sure=0.4, seed=seed, stored_bytes=40_000_000, energy={}),
            make_row("emr", 0.88, seed=seed, router="oracle", granularity="sample", stored_bytes=21_000_000),
            *(routed_row("duet", 0.7 + rank / 1000 + up, seed=seed, knobs={"rank": rank, "init": 0.3},
                         stored_bytes=11_000_000 + 100_000 * rank) for rank in KNOBS),
        ]  # fmt: skip
    return [*made, failed_row(error=f"ValueError: {SCRIPT} rank 0\n  at line 3")]


@cache
def shown():
    """The sections of `many_rows` and their page, drawn once for all test files of a process."""
    made = report.sections(summarise(many_rows()))
    return made, report.page(made)


VOID = {"wbr", "meta", "br", "hr", "img", "input", "link"}


@dataclass
class Node:
    tag: str
    attributes: dict = field(default_factory=dict)
    children: list = field(default_factory=list)

    @property
    def text(self):
        return " ".join("".join(self._words()).split())

    def _words(self):
        for child in self.children:
            yield from [child] if isinstance(child, str) else child._words()

    def all(self, tag, **attributes):
        """Every element of this tag, at any depth, whose classes hold `kind` and whose attributes are as given."""
        kind = attributes.pop("kind", None)
        for child in self.children:
            if isinstance(child, Node):
                same = all(child.attributes.get(name) == value for name, value in attributes.items())
                if (
                    tag in (child.tag, "*")
                    and same
                    and (kind is None or kind in child.attributes.get("class", "").split())
                ):
                    yield child
                yield from child.all(tag, **attributes, **({} if kind is None else {"kind": kind}))


class Reader(HTMLParser):
    """Refuses elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open = [Node("root")]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"not closed: {[node.tag for node in self.open[1:]]}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(text):
    return Reader(text).open[0]


def browser_path(own=None):
    """A Chromium: the one that CHROMIUM names, else Playwright's `own`, else one on PATH; None where there is none."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for path in map(shutil.which, [own or "", *names]) if path), None)
