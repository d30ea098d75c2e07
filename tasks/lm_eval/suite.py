"""Tasks of lm-eval, the Language Model Evaluation Harness (Gao et al., 2024), as a suite."""

from collections.abc import Mapping, Sequence

from merging.errors import UserError
from merging.preflight import check_range
from tasks.lm_eval.task import Asking, LmEvalTask
from tasks.suite import Suite, divided, unread

SIZES = ("calibration", "val")


def build(
    name: str,
    tasks: Sequence[str],
    sizes: Mapping[str, int],
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    metrics: Mapping[str, str] | None = None,
    reserve: Mapping[str, float] | None = None,
    held_out: Sequence[str] = (),
    chat_template: bool = False,
    tokenizer: str | None = None,
) -> Suite:
    """The suite of the named tasks and groups, `held_out` among them, which are scored only.

    num_fewshot: worked examples in each prompt; null leaves it to the task. limit: documents scored, the first ones.
    include_path: a folder with YAML tasks of one's own. metrics: task -> its score, "metric" or "metric,filter", where
    it is not the first of its file. reserve: task -> share of its scored documents, the first ones, that are set aside
    for routers and coefficients. chat_template: put that of the tokenizer around prompts; worked examples become turns
    of the conversation. tokenizer: folder or name. Raises UserError for options of no task and numbers out of range.
    """
    metrics, reserve = metrics or {}, reserve or {}
    if not tasks:
        raise UserError("suite.tasks is empty. Name tasks or groups of lm-eval: 'suite.tasks=[arc_easy,gsm8k]'.")
    for option, mapping in {"suite.metrics": metrics, "suite.reserve": reserve}.items():
        if others := unread(option, mapping, tasks):
            raise UserError(f"{option} names {others[0]}, no task of the suite: {', '.join(tasks)}.")
    for task, share in reserve.items():
        check_range(f"suite.reserve.{task}", share, 0, 0.9)
    if missing := [split for split in SIZES if sizes.get(split, 0) < 1] or sorted(set(sizes) - set(SIZES)):
        raise UserError(f"suite.sizes.{missing[0]} cannot be used: it is {{calibration: n, val: n}}, at least 1 each.")
    for option, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None:
            check_range(f"suite.{option}", value, least, 10**9)
    if chat_template and tokenizer is None:
        raise UserError(
            "suite.chat_template=true puts the chat template of a tokenizer around prompts, and the backbone names "
            "none. Set suite.tokenizer=<folder or name>."
        )
    chat = tokenizer if chat_template else None
    asking = Asking(include_path, num_fewshot, chat, limit, sizes["calibration"], sizes["val"])
    made = [LmEvalTask(task, asking, metrics.get(task), float(reserve.get(task, 0))) for task in tasks]
    return divided(name, made, held_out)
