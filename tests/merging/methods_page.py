"""The text of docs/methods.md, from what classes, files of conf/ and tests say already; methods are measured, too.

python tests/merging/methods_page.py > docs/methods.md
"""

import ast
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from samples import applied, family, lasting, quick, tower

from merging import Experts, methods
from merging.checkpoints import StateDict
from merging.checkpoints.base import Flat
from merging.merged import Merged
from merging.options import snake_case

ROOT = Path(__file__).parents[2]
CONF, TESTS, PAGE = ROOT / "conf", ROOT / "tests" / "merging", ROOT / "docs" / "methods.md"
TASKS = 4  # of the experts that a method is measured on
NEEDS = {"nothing": "Weights alone", "inputs": "Unlabelled inputs", "labels": "Labels"}
SENTENCE = re.compile(r"(?<=[.)]) (?=[A-Z]|arXiv|[a-z_]+(?:, [a-z_]+)*: )")  # between two of a docstring
SOURCE = re.compile(r"et al\.|arXiv|[Pp]ublic code|CVPR|mergekit's `|After the code|peft library")
APART = re.compile(
    r"\bours\b|\btheirs\b|authors|[Pp]ublished|mergekit|fusion_bench|[Ll]eft out|not built|verified|Unknown|the paper"
)
COMPARED = re.compile("published_steps|described_steps|plain_loop")  # in the name of a test
HEAD = """# Methods

Made from the classes, from conf/ and from the tests by `python tests/merging/methods_page.py > docs/methods.md`, as a
test compares. A line is a class, by the name that `method=` takes, with its presets. Options have their defaults; what
each means stands in the class.

- **kind**: static, one model for all inputs; routed, weighed by the input; oracle, chosen by the true task.
- **passes**: how often all numbers of an expert are read to merge it, measured on a small tower whose changes are kept
  in memory; 0 where experts stay in their files until the merge runs.
- **checked by**: a test of `tests/merging` that compares with an independent transcription of the published steps;
  "algebra" where there is none. `test_contract.py` holds for every method that takes any number of experts;
  `tests/transcribed.py` repeats the comparison on trained experts ([what it prints](mini8.md)).
- **ours and theirs**: what the class says of published values, of differences, and of what is left out.
"""
WHOLE = """## All in one table

`duet experiment=<name>` runs a whole field, and draws the fronts of scores against stored bytes, multiply-accumulates
and seconds of merging; `python -m launchers.table --sort needs` prints it by what methods need. Suites that give
prompts alone (`lm_eval`) run no method that learns from predictions or labels. What each field leaves out:
"""


@dataclass(frozen=True)
class Line:
    """What is known of one method."""

    name: str
    needs: str
    kind: str
    passes: str
    method: type

    @property
    def cells(self) -> list[str]:
        what, *rest = sentences(self.method)
        source = next(filter(SOURCE.search, rest), "")
        apart = " ".join(sentence for sentence in filter(APART.search, rest) if sentence != source)
        named = " ".join([f"`{self.name}`", *(f"`{preset}`" for preset in presets()[self.name] if preset != self.name)])
        checks = checked(self.method, bool(source))
        return [named, what, self.kind, options(self.method), self.passes, source.rstrip("."), checks, apart]


COLUMNS = ("method", "what it does", "kind", "options", "passes", "source", "checked by", "ours and theirs")


def sentences(method: type) -> list[str]:
    """Of the docstring."""
    return SENTENCE.split(" ".join((inspect.getdoc(method) or "").split()))


def options(method: type) -> str:
    """Fields with their defaults."""
    return ", ".join(f"`{option.name}={shown(default(option))}`" for option in fields(method))


def default(option: Field) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def shown(value: Any) -> str:
    """As YAML has it; of a part what differs from its own defaults."""
    if is_dataclass(value):
        differing = {option.name: getattr(value, option.name) for option in fields(value)
                     if getattr(value, option.name) != default(option)}  # fmt: skip
        inner = ", ".join(f"{name}={shown(inside)}" for name, inside in differing.items())
        return snake_case(type(value).__name__) + (f"({inner})" if inner else "")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(inside)}" for key, inside in value.items() if inside is not None) + "}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


@cache
def presets() -> Mapping[str, list[str]]:
    """The files of conf/method by the name of the class that they build."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((CONF / "method").glob("*.yaml")):
        found[snake_case(target(path.stem).rpartition(".")[2])].append(path.stem)
    return found


def target(name: str) -> str:
    """What a file of conf/method builds."""
    values = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text("utf-8"))
    behind = [entry for entry in values.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return values["_target_"] if "_target_" in values else target(behind[0])


class Counted(StateDict):
    """A checkpoint in memory that counts the entries which are read of every parameter."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.read: Counter[str] = Counter()

    def tensor(self, key: str):
        tensor = super().tensor(key)
        self.read[key] += tensor.numel()
        return tensor

    def flat(self, key: str) -> Flat:
        values = super().tensor(key).reshape(-1)

        def entries(first: int, last: int):
            self.read[key] += last - first
            return values[first:last]

        return Flat(len(values), entries)


def measured(name: str, method: type) -> Line:
    """A method with what it makes of experts, and how often it reads them."""
    merged, passes = run(quick(method))
    by_task = merged.routing is not None and merged.routing.by_task and not getattr(method, "routed", False)
    kind = "static" if merged.routing is None else "oracle" if by_task else "routed"
    made, longer = quick(method), lasting(quick(method), 3)
    more = run(longer)[1] - passes if longer != made else 0.0
    text = short(passes - 2 * more) + (f" and {short(more)} a step" if more else "")
    return Line(name, method().needs, kind, text, method)


def short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def run(method: Any) -> tuple[Merged, float]:
    """What a method makes of as many experts as it takes, and how often it reads all their numbers."""
    tasks = min(TASKS, max(getattr(method, "takes", [TASKS])))
    base, experts = family(tasks, tower())
    counted = [Counted(expert) for expert in experts]
    merged = applied(method, Experts.open(base, counted))
    if not merged.deltas:
        dict(merged.state())
    size = sum(tensor.numel() for tensor in base.values() if tensor.is_floating_point())
    return merged, sum(sum(expert.read.values()) for expert in counted) / size / tasks


@cache
def compared() -> list[tuple[str, bool, frozenset[str]]]:
    """Every test of methods: its name, whether it compares with published steps, and all names it leads to."""
    tests = []
    for path in sorted(TESTS.glob("test_*.py")):
        module = ast.parse(path.read_text("utf-8"))
        held = {name: node for node in module.body for name in defined(node)}
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        groups = [("", module.body), *((f"{node.name}::", node.body) for node in classes)]
        for group, node in ((group, node) for group, body in groups for node in body):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                name = f"{path.stem}::{group}{node.name}"
                tests.append((name, bool(COMPARED.search(name)), reached(node, held)))
    return tests


def defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives to values and helpers."""
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("test"):
        yield node.name
    if isinstance(node, ast.Assign):
        yield from (inner.id for inner in node.targets if isinstance(inner, ast.Name))


def reached(node: ast.AST, held: Mapping[str, ast.AST]) -> frozenset[str]:
    """All names in a node and in what of its module it uses."""
    waiting, names = [node], set()
    while waiting:
        for inner in ast.walk(waiting.pop()):
            if isinstance(inner, ast.Name) and inner.id not in names:
                names.add(inner.id)
                waiting += [held[inner.id]] if inner.id in held else []
    return frozenset(names)


def checked(method: type, published: bool) -> str:
    """The test that compares it with what was published, by its name, or that of most methods; else algebra."""
    name, known = snake_case(method.__name__), set(methods.discovered())
    fitting = []
    for test, alike, names in compared():
        if method.__name__ in names or (alike and test.startswith(f"test_{name}::")):
            alike, named, others = alike and published, sum(word in test for word in name.split("_")), names & known
            fitting.append((not alike, -named, -len(others) if alike else len(others), test))
    algebra, *_, test = min(fitting, default=(False, "test_contract"))
    return f"`{test}`" + (" (algebra)" if algebra else "")


def field() -> Iterator[str]:
    """What the experiments of the whole field leave out, and why, as their files say."""
    for path in sorted((CONF / "experiment").glob("field_*.yaml")):
        text = path.read_text("utf-8")
        title = text.splitlines()[1].removeprefix("# ")
        _, _, after = text.partition("# Left out:\n")
        reasons = [line.removeprefix("#   ") for line in after.splitlines() if line.startswith("#   ")]
        yield f"- `{path.stem}`: {title}"
        yield from (f"  - {', '.join(f'`{name}`' for name in names.split(', '))}: {why}"
                    for names, _, why in (reason.partition(": ") for reason in reasons))  # fmt: skip


def page() -> str:
    lines = [measured(snake_case(name), method) for name, method in methods.discovered().items()]
    text = [HEAD]
    for needs, title in NEEDS.items():
        group = sorted((line for line in lines if line.needs == needs), key=lambda line: line.name)
        text += [f"## {title}\n", row(COLUMNS), row(["---"] * len(COLUMNS)), *(row(line.cells) for line in group), ""]
    return "\n".join([*text, WHOLE, *field(), ""])


def row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
