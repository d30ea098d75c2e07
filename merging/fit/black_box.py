"""A few numbers found by the validation scores of the merges that they make: without gradients, by Optuna."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from merging.cache import code, key_of, modules_of
from merging.context import Context
from merging.errors import UserError
from merging.identity import identity
from merging.merged import Merged
from merging.options import Options, Within

Point = Mapping[str, float]  # numbers by name


class Axis(NamedTuple):
    """low <= number <= high, where it starts, and whether what lies between is seen on a logarithmic scale."""

    low: float
    high: float
    start: float
    log: bool = False

    def share(self, number: float) -> float:
        """Where a number lies between the ends, 0 to 1."""
        low, high, at = (math.log(value) if self.log else value for value in (self.low, self.high, number))
        return (at - low) / (high - low)

    def at(self, share: float) -> float:
        """The inverse of `share`; exactly the start where it lies."""
        if share == self.share(self.start):
            return self.start
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


class Tried(NamedTuple):
    """A point and its values, one a goal."""

    point: dict[str, float]
    values: tuple[float, ...]


class Best(NamedTuple):
    """The best point of a search, its value, and that of the point where it started."""

    point: dict[str, float]
    value: float
    start: float

    @property
    def remark(self) -> str:
        """What a reader of the scores of a merge made there should know."""
        found = ", ".join(f"{name} {number:.3g}" for name, number in sorted(self.point.items()))
        return f"mean validation score {self.start:.4f} where the search started, {self.value:.4f} at {found}"


@dataclass(frozen=True)
class Validation:
    """Scores on validation of the merge that numbers make, {task: score}, higher is better; a point is scored once.

    Also after a kill, where the context keeps unfinished work: a search that is run again then repeats itself up to
    where it was, and goes on. Raises UserError, before anything is merged, where there are no validation scores.
    """

    make: Callable[[Point], Merged]
    method: object
    context: Context
    _known: dict[str, dict[str, float]] = field(default_factory=dict)

    def __call__(self, point: Point) -> dict[str, float]:
        score, name = self.context.validation(), json.dumps(sorted(point.items()))
        if name not in self._known:
            key = key_of("validation", code(("merging", "tasks", *modules_of(self.method))), self.context.who,
                         identity(self.method), self.context.seed, name)  # fmt: skip
            make = lambda: json.dumps(signed(score(self.make(point))))  # noqa: E731
            stored = make() if self.context.unfinished is None else self.context.unfinished.text(key, make)
            self._known[name] = json.loads(stored)
        return self._known[name]


@dataclass(frozen=True)
class Trials(Options, prefix="a search's "):
    """What all searches by Optuna share. trials: points that are tried. Seeded by the context: the same values lead to
    the same points."""

    trials: int = 60
    needs: ClassVar[str] = "labels"  # of validation
    splits: ClassVar[tuple[str, ...]] = ("val",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trials, int) or self.trials < 1:
            raise UserError(f"a search's trials={self.trials} asks for no trial. Give 1, the start alone, or more.")

    def _tried(
        self,
        sampler: Callable[[Any], Any],
        values: Callable[[Point], Sequence[float]],
        axes: Mapping[str, Axis],
        starts: Sequence[Point],
        directions: Sequence[str],
        told: Callable[[list[Tried]], object],
    ) -> list[Tried]:
        """All trials, first those at `starts`; axes are seen in the order of their names. sampler: of the module
        optuna. told: hears of the trials so far behind each. Raises UserError without Optuna."""
        ordered, tried = sorted(axes), list[Tried]()
        with _quiet() as optuna:
            study = optuna.create_study(sampler=sampler(optuna.samplers), directions=directions)
            for start in starts:
                study.enqueue_trial({axis: axes[axis].share(start[axis]) for axis in ordered})
            for _ in range(self.trials):
                trial = study.ask()
                point = {axis: axes[axis].at(trial.suggest_float(axis, 0.0, 1.0)) for axis in ordered}
                tried.append(Tried(point, tuple(values(point))))
                study.tell(trial, tried[-1].values)
                told(tried)
        return tried


@dataclass(frozen=True)
class BlackBox(Trials, prefix="a search's "):
    """Optuna's search for the numbers of the highest value; the first trial is the start.

    sampler: "tpe", Bayesian optimisation by tree-structured Parzen estimators, the first ten at random; "cma_es", the
    covariance matrix adaptation of Hansen, in generations of 4 + 3 log(numbers); or "random". sigma: of cma_es, the
    first deviation from the start, as a share of every axis.
    """

    sampler: Literal["tpe", "cma_es", "random"] = "tpe"
    sigma: Annotated[float, Within(0.0, 1.0, open_low=True)] = 0.2

    def best(
        self, value: Callable[[Point], float], axes: Mapping[str, Axis], context: Context, name: str = "search"
    ) -> Best:
        """Where `value` was highest, the first of equals.

        The context's log gets the value of every trial and the best so far, as `name/value` and `name/best`.
        """
        start = {axis: axes[axis].start for axis in axes}

        def told(tried: list[Tried]) -> None:
            best = max(trial.values[0] for trial in tried)
            context.log({f"{name}/value": tried[-1].values[0], f"{name}/best": best}, len(tried) - 1)

        sampler = lambda samplers: self._sampler(samplers, axes, context.seed)  # noqa: E731
        tried = self._tried(sampler, lambda point: [value(point)], axes, [start], ["maximize"], told)
        best = max(tried, key=lambda trial: trial.values[0])
        return Best(best.point, best.values[0], tried[0].values[0])

    def _sampler(self, samplers: Any, axes: Mapping[str, Axis], seed: int) -> Any:
        if self.sampler != "cma_es":
            return {"tpe": samplers.TPESampler, "random": samplers.RandomSampler}[self.sampler](seed=seed)
        start = {name: axis.share(axis.start) for name, axis in axes.items()}
        return samplers.CmaEsSampler(x0=start, sigma0=self.sigma, seed=seed, warn_independent_sampling=False,
                                     independent_sampler=samplers.RandomSampler(seed=seed))  # fmt: skip


@dataclass(frozen=True)
class Evolution(Trials, prefix="a search's "):
    """Optuna's NSGA-II (Deb et al., 2002) for points of which no other is better in one value and in none worse.

    population: points of a generation; those tried first are the first one.
    """

    trials: int = 300
    population: Annotated[int, Within(2, 10**6)] = 20

    def tried(
        self,
        values: Callable[[Point], Sequence[float]],
        goals: Mapping[str, Literal["maximize", "minimize"]],
        axes: Mapping[str, Axis],
        starts: Sequence[Point],
        context: Context,
        name: str = "search",
    ) -> list[Tried]:
        """All points with their values, in the order of the goals; the first ones are `starts`.

        The context's log gets the values of every trial, as `name/<goal>`.
        """

        def told(tried: list[Tried]) -> None:
            last = zip(goals, tried[-1].values, strict=True)
            context.log({f"{name}/{goal}": value for goal, value in last}, len(tried) - 1)

        def sampler(samplers: Any) -> Any:
            return samplers.NSGAIISampler(population_size=self.population, seed=context.seed)

        return self._tried(sampler, values, axes, starts, list(goals.values()), told)


def signed(scores: Mapping[str, Any]) -> dict[str, float]:
    """The values of scores; of a metric whose lower values are better, their negatives."""
    return {task: score.value if score.higher_is_better else -score.value for task, score in scores.items()}


def mean(values: Mapping[str, float]) -> float:
    """The mean over tasks, to 12 digits, so that the order of a sum decides nothing."""
    return round(math.fsum(values.values()) / len(values), 12)


@contextmanager
def _quiet() -> Iterator[Any]:
    """Optuna, which tells of every trial, in silence. Raises UserError where it is not installed."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # which Optuna brings, and which tells of its plugins
    try:
        import cmaes  # noqa: F401  # what cma_es needs, and Optuna leaves to others from version 4 on
        import optuna
    except ImportError as error:
        raise UserError(
            "A search for coefficients needs the packages optuna and cmaes. Install them: pip install "
            "'duet-merging[search]'; or choose a method that does not search."
        ) from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # in versions 2 a start is one
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)
