"""The score that lm-eval gives to a model's answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.api.metrics
from lm_eval import evaluate
from lm_eval.api.model import LM

from merging.errors import UserError
from merging.preflight import some
from tasks.lm_eval.harness import ROLLING, Requests, loaded, requests, views
from tasks.lm_eval.task import LmEvalTask
from tasks.score import RESAMPLES, Score, bootstrap


def resampled(statistic: Any, values: Sequence[Any], iters: int = RESAMPLES) -> float:
    """Standard error of a statistic of a list, by bootstrap."""
    of = lambda chosen: float(statistic([values[index] for index in chosen]))  # noqa: E731
    return bootstrap(lambda draws: map(of, draws.tolist()), len(values))


lm_eval.api.metrics.bootstrap_stderr = resampled  # its own forks this process, workers and all, and prints


class Recorded(LM):
    """Answers what a model has answered, in the order of the requests."""

    def __init__(self, asked: Sequence[Requests], answers: Sequence[Sequence[Any]]):
        super().__init__()
        flat = [(request.request_type, answer) for pair in zip(asked, answers, strict=True)
                for request, answer in zip(*pair, strict=True)]  # fmt: skip
        self.answers = {kind: [answer for of, answer in flat if of == kind] for kind, _ in flat}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [(value, bool(greedy)) for value, greedy in self.answers["loglikelihood"]]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self.answers[ROLLING]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self.answers["generate_until"]


def score(ours: LmEvalTask, split: str, answers: Sequence[Sequence[Any]]) -> Score:
    """lm-eval's score of the answers to all requests, its standard error and count; its other metrics are parts.

    Raises UserError for a metric that the task does not have, and a group's without a standard error.
    """
    made, every = views(ours, split), loaded(ours.name, ours.asking.include_path)
    replayed = Recorded(requests(ours, split), answers)
    results: Any = evaluate(replayed, {**every, "tasks": made}, bootstrap_iters=RESAMPLES)  # type: ignore[arg-type]
    values = results["results"][ours.name]
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "_stderr," not in key}
    first = [*next(iter(made.values())).aggregation()]
    known = sorted((key for key in numbers if "," in key), key=lambda key: first.index(key.partition(",")[0]))
    chosen = chosen_metric(ours, known)
    metric, _, pipeline = chosen.partition(",")
    error = values.get(f"{metric}_stderr,{pipeline}")
    if not isinstance(error, int | float):
        error = _error(ours, made, results, metric, pipeline)
    better = {name: up for view in made.values() for name, up in view.higher_is_better().items()}
    parts = {short(key): float(numbers[key]) for key in known if key != chosen and math.isfinite(numbers[key])}
    count = sum(len(view.eval_docs) for view in made.values())
    return Score(short(chosen), float(numbers[chosen]), count, float(error), bool(better.get(metric, True)), parts)


def _error(ours: LmEvalTask, made: Mapping[str, Any], results: Any, metric: str, pipeline: str) -> float:
    """The standard error of a metric for which lm-eval has none."""
    if ours.name not in made:
        raise UserError(
            f"lm-eval knows no standard error of {metric}, the score of the group {ours.name}. Name its tasks in "
            f"suite.tasks instead: {some(list(made), 6)}."
        )
    values = [sample[metric] for sample in results["samples"][ours.name] if sample["filter"] == pipeline]
    return resampled(made[ours.name].aggregation()[metric], values)


def short(metric: str) -> str:
    """The name of a metric, without that of the default filter."""
    return metric.removesuffix(",none")


def chosen_metric(ours: LmEvalTask, available: Sequence[str]) -> str:
    """The metric that is the score, "metric" or "metric,filter": the first of its file unless another is named."""
    if ours.metric is None:
        return available[0]
    fitting = [metric for metric in available if ours.metric in (metric, metric.partition(",")[0])]
    if not fitting:
        raise UserError(
            f"suite.metrics.{ours.name}={ours.metric} is no metric of it. There are {', '.join(map(short, available))}."
        )
    return fitting[0]
