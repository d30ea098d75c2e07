"""What an architecture is to the rest of the library: the Backbone protocol, and tables of what every parameter is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from torch import Tensor, nn

from merging.errors import UserError

KINDS = (
    *("ffn_in", "ffn_gate", "ffn_up", "ffn_out"),
    *("attention_q", "attention_k", "attention_v", "attention_qkv", "attention_out"),
    *("norm", "embedding", "projection", "head", "other"),
)
FAMILIES = ("ffn", "attention")
HIDDEN_AXIS = {"ffn_in": 0, "ffn_gate": 0, "ffn_up": 0, "ffn_out": 1}  # of matrices [out, in]
ARCHITECTURES = Path(__file__).with_name("architectures")


@dataclass(frozen=True)
class ParamInfo:
    """What one parameter is.

    kind: one of KINDS. Of a gated FFN `ffn_gate` goes through the activation and `ffn_up` does not; an FFN without a
    gate has `ffn_in`. `projection` maps features onwards and is merged (CLIP's, poolers, language heads); a `head`
    belongs to one task and never is. depth, block: index and name of the transformer block, None outside. hidden_axis:
    where hidden neurons of an FFN lie, of the matrix as [out, in]. module: name of the module that owns it. transposed:
    stored as [in, out]. tied: the parameter whose tensor it shares where a model ties them. after: outside the blocks
    and behind them. pooled: acts on one token of a sample, not on all.
    """

    kind: str
    depth: int | None
    block: str | None
    hidden_axis: int | None
    module: str
    transposed: bool = False
    tied: str | None = None
    after: bool = False
    pooled: bool = False

    @property
    def family(self) -> str:
        """ffn | attention, or the kind itself."""
        start = self.kind.partition("_")[0]
        return start if start in FAMILIES else self.kind

    def is_a(self, kind: str) -> bool:
        """Whether it is of a kind or of a family."""
        return kind in (self.kind, self.family)

    @property
    def stored_axis(self) -> int | None:
        """The hidden axis of the tensor as it is stored."""
        return 1 - self.hidden_axis if self.transposed and self.hidden_axis is not None else self.hidden_axis


class Backbone(Protocol):
    """Everything about an architecture; adapters inherit it. `facts` rebuild it, see `from_facts`.

    table: name of the table of its parameters. tokens: of one sample.
    """

    name: str

    @property
    def table(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    def facts(self) -> dict[str, object]: ...

    def identity(self) -> dict[str, object]:
        """All that a result depends on beside the weights, as JSON."""
        ...

    def build(self) -> nn.Module:
        """The module with random weights, in evaluation mode, without a head that belongs to a task."""
        ...

    def example(self, count: int) -> Any:
        """A batch without content that `prepare` takes."""
        ...

    def prepare(self, batch: Any) -> Any:
        """What the module takes, of uint8 images, of texts, or of what is prepared already."""
        ...

    def features(self, module: nn.Module, inputs: Any) -> Tensor:
        """What a task's head reads, [N, D]."""
        ...

    def outputs(self, module: nn.Module, inputs: Any) -> Tensor:
        """What a model without a task's head answers by itself: a language model's logits."""
        ...

    def param(self, key: str) -> ParamInfo:
        """Raises UserError naming table and key for a parameter that the table does not have."""
        return table(self.table).param(key)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The transformer blocks in the order of the parameters: those of an encoder before a decoder's."""
        names = dict.fromkeys(self.param(key).block for key, _ in module.named_parameters())
        return [module.get_submodule(name) for name in names if name is not None]

    def head_keys(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that belong to a task's head, which is never merged."""
        return table(self.table).head_keys(keys)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        with torch.device("meta"):
            return count_macs(self.build(), self.prepare(self.example(1)))


def from_facts(facts: Mapping[str, Any]) -> Backbone:
    """The backbone of a saved model's header. Raises UserError for a family that this library does not know."""
    from merging.backbones.hugging_face import HuggingFace
    from merging.backbones.open_clip import OpenClip

    families = {"open_clip": OpenClip, "hugging_face": HuggingFace}
    options = dict(facts)
    family = options.pop("family", "open_clip")  # the only one of earlier versions, which did not say
    if family not in families:
        raise UserError(f"There is no family {family} of backbones. There are {', '.join(families)}.")
    return families[family](**{"name": family, **options})


class Row(NamedTuple):
    """One line of a table: names, and what their parameters are apart from where they lie."""

    names: re.Pattern[str]
    info: ParamInfo


@dataclass(frozen=True, eq=False)
class Table:
    """What every parameter of an architecture is, by name. models: Hugging Face's model types that it holds for."""

    name: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]

    def find(self, key: str) -> ParamInfo | None:
        """None for a name that it does not have: nothing is guessed."""
        return _find(self, key)

    def param(self, key: str) -> ParamInfo:
        """Raises UserError naming the table and the key for one that it does not have."""
        info = self.find(key)
        if info is None:
            raise UserError(f"{key} is not in the table {self.name} ({self.name}.yaml), {CONSEQUENCE}")
        return info

    def head_keys(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that belong to a task's head, which is never merged."""
        infos = ((key, self.find(key)) for key in keys)
        return tuple(key for key, info in infos if info is not None and info.kind == "head")


CONSEQUENCE = (
    "so that its kind, block and hidden neurons are not known. Give checkpoints of an architecture that has a table, "
    "write one beside those in merging/backbones/architectures, or choose a method that does not ask: average, "
    "task_arithmetic, ties, dare, tsv_m, iso_c, iso_cts, emr, tall_mask, or twin with start=null."
)


@lru_cache(maxsize=1 << 16)
def _find(table: Table, key: str) -> ParamInfo | None:
    matches = ((row.info, row.names.fullmatch(key)) for row in table.rows)
    return next((_placed(info, key, match) for info, match in matches if match), None)


def _placed(info: ParamInfo, key: str, match: re.Match[str]) -> ParamInfo:
    """What a row says, of one name."""
    groups, bias = match.groupdict(), key.endswith("bias")
    inside = groups.get("i") is not None
    return replace(
        info,
        depth=int(match["i"]) if inside else None,
        block=key[: match.end("i")] if inside else None,
        hidden_axis=None if bias and info.kind == "ffn_out" else info.hidden_axis,
        module=key.rpartition(".")[0],
        transposed=info.transposed and not bias,
        tied=info.tied and groups.get("prefix", "") + info.tied,
    )


@cache
def tables() -> dict[str, Table]:
    """All tables of architectures/, by name."""
    return {path.stem: _read(path) for path in sorted(ARCHITECTURES.glob("*.yaml"))}


def _read(path: Path) -> Table:
    facts = yaml.safe_load(path.read_text("utf-8"))
    prefix = f"(?P<prefix>{'|'.join(map(re.escape, facts['prefixes']))})"
    rows = [_row(prefix, name, row) for name, row in facts["body"].items()]
    rows += [_row("", name, row) for name, row in facts["around"].items()]
    return Table(path.stem, tuple(facts.get("models", ())), tuple(rows))


def _row(prefix: str, name: str, line: str) -> Row:
    kind, *flags = line.split()
    options: dict[str, Any] = {flag: value or True for flag, _, value in (text.partition("=") for text in flags)}
    pattern = name.replace(".", r"\.").replace("{i}", r"(?P<i>\d+)")
    return Row(re.compile(prefix + pattern), ParamInfo(kind, None, None, HIDDEN_AXIS.get(kind), "", **options))


def table(name: str) -> Table:
    """A table by its name. Raises UserError for one that is not there."""
    if name not in tables():
        raise UserError(f"There is no table {name} of an architecture's parameters. There are {', '.join(tables())}.")
    return tables()[name]


def table_for(name: str | None, keys: Sequence[str]) -> Table:
    """The table of that name, or without a name the one that has all these keys.

    Raises UserError where there is none, naming the nearest and a key that it lacks, and where there are several that
    say different things.
    """
    found = _table_of(tuple(keys)) if name is None else table(name)
    if isinstance(found, str):
        raise UserError(found)
    return found


@lru_cache(maxsize=64)
def _table_of(keys: tuple[str, ...]) -> Table | str:
    """The table that has all these keys, or why there is none."""
    missing = {name: [key for key in keys if known.find(key) is None] for name, known in tables().items()}
    fitting = [name for name, lacking in missing.items() if not lacking]
    if not fitting:
        nearest = min(missing, key=lambda name: len(missing[name]))
        others = ", ".join(name for name in missing if name != nearest)
        return (
            f"{missing[nearest][0]} is not in the table {nearest}, nor does another ({others}) have all names of these "
            f"checkpoints, {CONSEQUENCE}"
        )
    first = tables()[fitting[0]]
    for name in fitting[1:]:
        if differing := [key for key in keys if tables()[name].find(key) != first.find(key)]:
            return (
                f"The names of these checkpoints are in the tables {first.name} and {name}, which differ about "
                f"{differing[0]}. Name the one that is meant: Experts.open(..., table={first.name!r})."
            )
    return first


def count_macs(module: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of one forward on the meta device, by torch's own counter.

    It takes no memory there; and a CPU would run attention by a fast path that is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    return counter.get_total_flops() // 2


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, 3, H, W] -> fp32; `mean` and `std` per channel are those of values in [0, 1]."""
    center, spread = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images.float() - 255 * center) / (255 * spread)
