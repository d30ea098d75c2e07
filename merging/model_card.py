"""The model card of a merge: README.md of its folder, as the Hub shows it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from merging.merged import Merged

TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(name: str, auto: str, merged: "Merged", record: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """The text. auto: the class of transformers or peft that loads it. record: see merging.saving.record; its `scores`
    (task -> metric, value, standard_error, count), `split`, `seed` and `command` are shown where they are known.
    """
    from jinja2 import Environment, StrictUndefined

    named = dict(record.get("method") or {"name": "unknown"})
    method = str(named.pop("name"))
    named = _said(named)
    ids = dict(zip(merged.tasks, record.get("experts", ()), strict=False))
    experts = [
        {"task": task, "path": _shown(checkpoint), "id": ids.get(task, "")[:12]}
        for task, checkpoint in zip(merged.tasks, merged.inputs, strict=False)
    ]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False,
                              keep_trailing_newline=True)  # fmt: skip
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        name=name,
        auto=auto,
        library="peft" if "Peft" in auto else "transformers",
        method=method,
        options=yaml.safe_dump(named, sort_keys=False).strip() if named else "",
        scale=merged.scale,
        routing=merged.routing if merged.deltas else None,
        given=merged.routing is not None and merged.routing.by_task and bool(merged.deltas),
        corrected=bool(merged.corrections),
        parts=merged.parts,
        base={"path": _shown(merged.base), "id": str(record["base"])[:12]},
        experts=experts,
        heads=sorted(merged.heads),
        scores=record.get("scores") or {},
        protocol={key: record.get(key) for key in ("split", "seed")},
        command=record.get("command"),
        remarks=remarks,
    )


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, those of inner methods too, without mappings of names that have no values."""
    known = {key: _said(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {
        key: value
        for key, value in known.items()
        if not (isinstance(value, Mapping) and all(inner is None for inner in value.values()))
    }


def _shown(checkpoint: Any) -> str:
    """The folder of a checkpoint, or its file, by its last name: paths say where somebody's disk is."""
    if not checkpoint.files:
        return "in memory"
    file = checkpoint.files[0]
    return file.parent.name if file.name.startswith(("model", "pytorch_model", "adapter_model")) else file.name
