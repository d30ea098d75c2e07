"""What lm-eval knows of its tasks: which there are, their documents by split, and requests to a model."""

import copy
import difflib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from typing import Any

import lm_eval.api.task
import torch
from jinja2 import TemplateError
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from merging.errors import UserError
from merging.ops import generator
from merging.preflight import some
from tasks.lm_eval.chat import template_of, unbegun
from tasks.lm_eval.task import LmEvalTask

lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]  # bars across our own output
logging.getLogger("lm_eval").setLevel(logging.ERROR)
SEED = 1234  # of the draw of worked examples: lm-eval's own, with which published numbers are made
ROLLING = "loglikelihood_rolling"
UNPROMPTED = "{} weighs whole texts, without a prompt that gates could see. Score it with a merge that is not routed."
POOLS = {  # where documents that are not scored come from; of one for both, val has the end
    "calibration": ("train", "reserved", "validation", "shots"),
    "val": ("validation", "reserved", "train", "shots"),
}
Requests = Sequence[Any]  # lm-eval's Instances for one document


@cache
def manager(include_path: str | None, shipped: bool) -> TaskManager:
    """lm-eval's index of tasks; that of those that it comes with takes seconds."""
    return TaskManager(include_path=include_path, include_defaults=shipped)


def found(name: str, include_path: str | None) -> TaskManager | None:
    """A manager that has a task and, of a group, all in it: that of the user's folder, if it does."""
    if include_path is not None:
        own = manager(include_path, False)
        members = (own.task_index[name].cfg or {}).get("task") if name in own.task_index else None
        if isinstance(members, str) or (members and all(member in own.task_index for member in members)):
            return own
    every = manager(include_path, True)
    return every if name in every.task_index else None


def check(name: str, include_path: str | None) -> None:
    """Raises UserError for a folder that is not there, a name that lm-eval does not have, and a tag."""
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"suite.include_path={include_path} is no folder. Name the one with YAML tasks of your own.")
    index = found(name, include_path)
    if index is None:
        near = difflib.get_close_matches(name, manager(include_path, True).all_tasks, 3, 0.6)
        hint = f"Did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"lm-eval {version('lm_eval')} has no task {name}. {hint}`lm-eval ls tasks` lists them; one of your "
            f"own needs suite.include_path=<folder with its YAML>."
        )
    if index.task_index[name].kind.name == "TAG":
        members = [task for task, entry in index.task_index.items() if name in entry.tags]
        raise UserError(
            f"{name} is a tag of several tasks of lm-eval that have no score together: name them one by one in "
            f"suite.tasks ({some(members, 6)})."
        )


@cache
def loaded(name: str, include_path: str | None) -> Any:
    """Tasks and groups by name. Raises UserError for data that cannot be read and tasks that are not scored here."""
    index = found(name, include_path)
    assert index is not None
    try:
        every: Any = index.load([name])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"lm-eval cannot open its task {name}: {type(error).__name__}: {reason} Its data set may need a network, "
            f"or a loading script, which datasets no longer runs."
        ) from error
    for task in every["tasks"].values():
        if why := refusal(task):
            raise UserError(f"{task.task_name} cannot be scored here: {why}. Leave it out of suite.tasks.")
    if name not in every["tasks"] and not every["groups"][name].has_aggregation:
        raise UserError(
            f"The group {name} of lm-eval has no score of its own. Name its tasks in suite.tasks: "
            f"{some(list(every['tasks']), 6)}."
        )
    return every


def refusal(task: Any) -> str | None:
    """Why a task is not scored, if it is not."""
    options = task.get_config("generation_kwargs") or {}
    if getattr(task, "UNSAFE_CODE", False):
        return "it executes what the model writes"
    if getattr(task, "MULTIMODAL", False):
        return "it shows images or sounds"
    if options.get("do_sample") or (task.get_config("repeats") or 1) > 1:
        return "it samples its answers, so that no two runs give the same"
    return None


def documents(task: Any, ours: LmEvalTask, split: str, share: int) -> list[Any]:
    """Those of one of lm-eval's tasks for a split, at most `share` of what is not scored. May be empty."""
    limit, scored = ours.asking.limit, task.eval_docs
    reserved = int(ours.reserve * len(scored))
    if split == "test":
        stop = len(scored) if limit is None else min(len(scored), reserved + limit)
        return [scored[index] for index in range(reserved, stop)]
    if split not in POOLS:
        raise UserError(f"{ours.name} is a task of lm-eval, which is scored only: it has no split {split} to train on.")
    pools = {name: pool for name, pool in unscored(task).items() if len(pool)}
    pools |= {"reserved": [scored[index] for index in range(reserved)]} if reserved else {}
    taken = {use: next((name for name in order if name in pools), None) for use, order in POOLS.items()}
    if (source := taken[split]) is None:
        return []
    pool = pools[source]
    order = torch.randperm(len(pool), generator=generator("lm-eval", task.task_name)).tolist()
    if taken["val"] == taken["calibration"]:
        half = len(pool) // 2
        order = order[half:] if split == "val" else order[:half]
    return [pool[index] for index in order[:share]]


def unscored(task: Any) -> dict[str, Any]:
    """The documents of a task outside the split that is scored, by what they are for."""
    names = {use: task.get_config(f"{use}_split") for use in ("training", "validation", "test", "fewshot")}
    scored = names["test"] if task.has_test_docs() else names["validation"]
    pools = {}
    if task.has_training_docs() and names["training"] != scored:
        pools["train"] = task.training_docs()
    if task.has_validation_docs() and task.has_test_docs() and names["validation"] != scored:
        pools["validation"] = task.validation_docs()
    if names["fewshot"] not in (None, scored):
        pools["shots"] = task.fewshot_docs()
    return pools


def views(ours: LmEvalTask, split: str) -> dict[str, Any]:
    """Copies of lm-eval's tasks with the documents of a split as those to score. Raises UserError without any."""
    every = loaded(ours.name, ours.asking.include_path)["tasks"]
    sizes = {"calibration": ours.asking.calibration, "val": ours.asking.val}
    share = -(-sizes.get(split, 0) // len(every))
    made = {}
    for name, task in every.items():
        if docs := documents(task, ours, split, share):
            made[name] = _view(task, docs, ours, split)
    if not made or (len(made) < len(every) and split == "test"):
        raise UserError(
            f"{ours.name} has no documents for the split {split}: lm-eval scores all that it has, "
            f"and what is scored must not be seen before. Set some aside, +suite.reserve.{ours.name}=0.3, or use what "
            f"needs none: a fixed coefficient (scale=fixed), a router that is not trained."
        )
    return made


def _view(task: Any, docs: list[Any], ours: LmEvalTask, split: str) -> Any:
    view, shots = copy.copy(task), ours.asking.num_fewshot
    view._config, view._instances = copy.copy(task.config), None
    if hasattr(task, "sampler"):
        view.sampler = copy.copy(task.sampler)
    if shots is not None and task.get_config("num_fewshot") != 0:
        view.set_config("num_fewshot", shots)
    elif task.get_config("num_fewshot") is None:
        view.set_config("num_fewshot", 0)
    if (
        split != "test"
    ):  # a document may lie among those that worked examples are drawn from: lm-eval leaves it out then
        view.set_config("test_split", getattr(getattr(task, "fewshot_cfg", None), "split", None))
    view.set_fewshot_seed(seed=SEED)
    view.has_test_docs, view.test_docs = lambda: True, lambda: docs
    return view


@lru_cache(maxsize=256)
def requests(ours: LmEvalTask, split: str) -> tuple[Requests, ...]:
    """What is asked of a model for every document of a split, never changed."""
    asked: list[Requests] = []
    chat = {} if ours.asking.chat is None else {"chat_template": template_of(ours.asking.chat)}
    turns = dict.fromkeys(("apply_chat_template", "fewshot_as_multiturn"), bool(chat))  # as lm-eval's own command
    for view in views(ours, split).values():
        try:
            view.build_all_requests(**turns, **chat)
        except (AssertionError, ValueError, KeyError, TypeError, TemplateError) as error:
            raise UserError(
                f"lm-eval cannot make the prompts of {view.task_name}: {error}. Check suite.num_fewshot and the "
                f"fields that its YAML names."
            ) from error
        asked += [tuple(group) for _, group in groupby(view.instances, lambda instance: instance.doc_id)]
    return tuple(asked)


def prompt(ours: LmEvalTask, asked: Requests) -> str:
    """What stands before the answer, of several the first; nothing of a text that is weighed whole."""
    if asked[0].request_type == ROLLING:
        return ""
    text = asked[0].args[0]
    return text if ours.asking.chat is None else unbegun(text, ours.asking.chat)


def content(ours: LmEvalTask, split: str) -> str:
    """Id of the requests and right answers of a split, and of how they are scored."""
    made = views(ours, split)
    targets = [[view.doc_to_target(doc) for doc in view.eval_docs] for view in made.values()]
    asked = [[request.args for request in document] for document in requests(ours, split)]
    how = [[view.VERSION, list(view.aggregation()), view.dump_config().get("filter_list")] for view in made.values()]
    parts = [version("lm_eval"), ours.metric, list(made), how, targets, asked]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def notes(ours: LmEvalTask) -> list[str]:
    """What a reader of the scores should know of how the task was asked."""
    tasks = loaded(ours.name, ours.asking.include_path)["tasks"].values()
    shots = ours.asking.num_fewshot
    said = [] if ours.asking.chat is None else ["asked in the chat template of the tokenizer"]
    if shots and any(task.get_config("num_fewshot") == 0 for task in tasks):
        said += [f"its own file says that prompts have no worked examples, num_fewshot={shots} changes nothing"]
    return said
