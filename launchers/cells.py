"""One cell: merge with one method, choose its scale, score every task, write the row."""

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from launchers.cell_cache import expert_scores, fitted
from launchers.rows import Row
from launchers.saves import Save
from merging.accounting import macs
from merging.api import describe
from merging.cache import Cache, code, modules_of
from merging.checkpoints import StateDict
from merging.context import ALONE, Context, Log, Opened, adaptation, needs_of, silent, splits_of
from merging.experts import Experts
from merging.fit.descent import terms_of
from merging.fit.gates import Learned, Router
from merging.fit.objectives import Entropy, MarginalEntropy, PseudoLabels
from merging.identity import fingerprint, identity
from merging.merged import Merged
from merging.methods import Expert, Multitask
from merging.methods.method import Method, call
from merging.preflight import some
from merging.similarity import cosines
from tasks.evaluate import Grid, Routing
from tasks.heads.probe import probed
from tasks.journal import Journal
from tasks.scales import Fixed, Search
from tasks.score import Score
from tasks.suite import Suite, contents, remarks
from tasks.unseen import Unseen, score_unseen

log = logging.getLogger(__name__)
Config = dict[str, Any]
OnTask = Callable[[str, float], object]
SCALE = "scale"  # who picks a coefficient by labelled scores: selection, not adaptation
PROBE = "probe"  # who fits heads on a finished merge: a diagnosis beside its score


@dataclass(frozen=True)
class Setup:
    """What the cells of one configuration share: experts loaded once, a grid with its towers and samples."""

    experts: Experts
    grid: Grid
    source: Any  # where base and experts come from
    context: Context = ALONE  # the data of the tasks
    unfinished: Path | None = None  # folder for what a cell has done so far
    remarks: tuple[str, ...] = ()  # on the experts
    gates: Cache | None = None  # trained ones, by content
    unseen: Experts | None = None  # of the held-out tasks, where there are any: what the expert row is scored with
    files: str | None = None  # in which state experts and samples were opened, see launchers.found

    @property
    def checkpoints(self) -> dict[str, str]:
        ids = {"base": self.experts.origin.id}
        for experts in (self.experts, self.unseen) if self.unseen is not None else (self.experts,):
            ids |= {task: checkpoint.id for task, checkpoint in zip(experts.tasks, experts.checkpoints, strict=True)}
        return ids


@dataclass(frozen=True)
class Cell:
    """A method in a setup. `config` is how a row tells what was chosen; the `identity` names the row."""

    label: str
    method: Method
    scale: Fixed | Search
    router: Router
    config: Config
    setup: Setup
    overrides: Sequence[str] = ()  # of the command

    @property
    def checkpoints(self) -> dict[str, str]:
        """Content ids of base and experts; of the row of the model of all tasks also its own, which is trained now."""
        trained = self.setup.context.data if isinstance(self.method, Multitask) else None
        return self.setup.checkpoints | ({} if trained is None else {"multitask": trained.multitask().id})

    @property
    def run_id(self) -> str:
        return fingerprint(self.identity, 12)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the numbers: what computes them, and the contents of what they are computed from."""
        setup, granularity = self.setup, getattr(getattr(self.router, "gate", None), "granularity", None)
        engine = identity(setup.grid.engine)
        if granularity not in ("batch", "mixed"):
            engine.pop("batch")  # a sample then does not depend on those beside it
        parts = {"method": self.method, "scale": self.scale, "router": self.router, "experts": setup.source}
        return identity(parts) | {
            "backbone": identity(setup.grid.backbone),
            "engine": engine,
            "suite": [setup.grid.suite.name, *setup.grid.suite.names],
            "checkpoints": self.checkpoints,
            "contents": self.contents,
            **{name: self.config.get(name) for name in ("seed", "split", "save_dtype")},
            **({"probe": True} if "probe" in self.config else {}),
        }

    @cached_property
    def contents(self) -> dict[str, dict[str, str]]:
        """Task -> ids of its head and of the splits that are read."""
        read = splits_read(self.method, self.scale, self.router)
        return contents(self.setup.grid.suite, self.split, read)

    @property
    def split(self) -> str:
        """What is scored: the test split, or validation while a setting is being chosen."""
        return self.config.get("split", "test")

    def row(self, chosen_on: Sequence[str] = ()) -> Row:
        """The row before any result: everything that is known without computing, and what was chosen on which split."""
        grid, experts = self.setup.grid, self.setup.experts
        of_merge = [f"experts: {experts.differing}"] if experts.differing else []
        if dtype := self.config.get("save_dtype"):
            of_merge.append(f"{self.label}: what all inputs share is scored and saved as {dtype}")
        if unheard := without_entropy(grid.suite, self.method, self.router):
            of_merge.append(f"{self.label}: {some(unheard)} with one output each have no entropy to learn by")
        scored = {task.name: task.split(self.split) for task in grid.suite.every}
        return Row(
            run_id=self.run_id,
            status="ok",
            method=self.label,
            config=self.config,
            suite=grid.suite.name,
            tasks=list(grid.suite.names),
            needs=self.method.needs,
            family=self.setup.source.family,
            owned=experts.owned,
            checkpoints=self.checkpoints,
            splits={name: {"name": self.split, "id": split.id, "size": len(split)} for name, split in scored.items()},
            seed=self.config["seed"],
            code=code_version(),
            macs=grid.backbone.macs,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            remarks=[*self.setup.remarks, *of_merge, *remarks(grid.suite, scored, chosen_on, grid.backbone)],
            unseen={task.name: None for task in grid.suite.held_out},
            contents=self.contents,
            overrides=[*self.overrides],
        )

    @property
    def journal(self) -> Journal:
        """What this cell has done before it was killed; only the same code goes on with it."""
        folder = self.setup.unfinished
        made_by = code(("merging", "tasks", *modules_of(self.method)))
        return Journal(None if folder is None else folder / self.run_id, made_by)

    def compute(self, on_task: OnTask, save: Save | None = None, log_step: Log = silent) -> Row:
        """Merge, choose the scale on validation, train the gates, score the split once.

        `on_task` hears each accuracy, `log_step` the losses of a gate in training. Scores and trained gates of a run
        that was killed are used again.
        """
        grid, journal, opened, ends = self.setup.grid, self.journal, Opened(), {"begin": time.perf_counter()}
        context = replace(
            self.setup.context, seed=self.config["seed"], log=log_step, opened=opened, unfinished=journal.cache
        )
        merged = call(self.method, self.setup.experts, context.acting(f"method={self.label}", self.method))
        if "save_dtype" in self.config:
            merged = merged.cast(self.config["save_dtype"])
        ends["merge"] = time.perf_counter()
        references = partial(expert_scores, setup=self.setup, journal=journal)
        chosen = self.scale.choose(merged, grid, references, journal)
        merged, validation = chosen.merged, chosen.validation
        if validation is not None and isinstance(self.scale, Search):
            opened.note(SCALE, self.scale.split)
        ends["search"] = time.perf_counter()
        collapsed, training = list[str](), {}
        if merged.routing is not None and merged.routing.router == "learned":
            merged, collapsed, seconds = fitted(self, merged, journal, context)
            training = {"router": round(seconds, 3)}  # whichever cell trained the gates
            ends["router"] = time.perf_counter()
        scored = grid.score(merged, self.split, on_task, journal)
        unseen = self._unseen(merged, journal)
        ends["score"] = time.perf_counter()
        spans = {phase: round(end - begin, 3) for (_, begin), (phase, end) in pairwise(ends.items())}
        if save is not None:
            protocol, facts = {"split": self.split, "seed": self.config["seed"]}, grid.backbone.facts()
            save.write(self._whole(merged, opened), scored.scores, protocol, backbone=facts)
        row = replace(
            row := self.row(opened.by(SCALE)),
            remarks=[*row.remarks, *(f"{self.label}: {remark}" for remark in merged.remarks)],
            scores=dict(scored.scores),
            validation=validation and {task: score.value for task, score in validation.items()},
            collapsed=collapsed,
            scale=merged.scale,
            scale_source="-" if merged.scale is None else "fixed" if validation is None else self.scale.source,
            search=chosen.search,
            seconds=spans | training,
            unseen=dict(unseen.scores),
            probe=self._probe(merged, opened),
            **self._model_facts(merged, scored.routing, unseen, opened.splits),
        )
        log.info("%s: %s", self.label, summary_line(row))
        return row

    def _whole(self, merged: Merged, opened: Opened) -> Merged:
        """The merge as it is saved: with what it was made of, by whom, and its heads."""
        about = {"method": describe(self.method), "run_id": self.run_id, "opened": opened.splits}
        experts = self.setup.experts
        return replace(merged, provenance={**merged.provenance, **about}, inputs=experts.inputs, heads=experts.heads)

    def _unseen(self, merged: Merged, journal: Journal) -> Unseen:
        """Scores on the held-out tasks; in the expert row those of their own experts, where there are any."""
        grid, experts = self.setup.grid, self.setup.unseen
        if experts is None or not isinstance(self.method, Expert):
            owned = {} if experts is None else experts.kept  # a held-out task answers with its own, too
            return score_unseen(grid, replace(merged, owned={**merged.owned, **owned}), self.split, journal)
        held_out = Grid(grid.suite.unseen, grid.backbone, grid.engine)
        return Unseen({**held_out.score(call(self.method, experts), self.split, journal=journal).scores}, {})

    def _probe(self, merged: Merged, opened: Opened) -> dict[str, Score]:
        """Scores of a static merge under linear heads fitted on its features and labels of train, where asked for."""
        if "probe" not in self.config or merged.deltas:
            return {}
        grid = self.setup.grid
        opened.note(PROBE, "train")
        rest = {key: merged.base.tensor(key) for key in merged.base.specs() if key not in merged.specs}
        suite = probed(grid.suite, StateDict(rest | dict(merged.state())), grid.backbone, grid.engine)
        bare = replace(merged, owned={}, corrections={})
        return {**Grid(suite, grid.backbone, grid.engine).score(bare, self.split).scores}

    def _model_facts(
        self, merged: Merged, routed: Routing | None, unseen: Unseen, opened: dict[str, list[str]]
    ) -> dict[str, Any]:
        """What a row says of the merged model itself; cosines between the task vectors, the same for every method, in
        the rows of the experts alone."""
        routing, adapted, declared = merged.routing, adaptation(opened, [SCALE, PROBE]), needs_of(self.method)
        used = "nothing" if adapted == "none" else "inputs"
        similarity = cosines(self.setup.experts).tolist() if isinstance(self.method, Expert) else []
        weights = {"unseen": unseen.weights} if unseen.weights else {}
        front: Any = merged.provenance.get("front", ())
        return {
            "needs": declared if declared == "labels" else used,
            "opened": opened,
            "adaptation": adapted,
            "router": routing.router if routing else "none",
            "granularity": routing.granularity if routing else "none",
            "stored_bytes": merged.stored_bytes,
            "params": merged.params,
            "macs": macs(merged, self.setup.grid.backbone),
            "routing": {} if routed is None else routed._asdict() | weights,
            "energy": {key: [round(share, 5) for share in shares] for key, shares in merged.energy.items()},
            "front": [{name: point[name] for name in ("scores", "storage") if name in point} for point in front],
            "similarity": [[round(cosine, 5) for cosine in line] for line in similarity],
        }


@cache
def code_version() -> str:
    """The commit of the checkout this file lies in, `-dirty` if changed; else the installed version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9"]
        described = subprocess.run(command, capture_output=True, text=True, check=False)
        if described.returncode == 0:
            return described.stdout.strip()
    try:
        return version("duet-merging")
    except PackageNotFoundError:
        return "unknown"


def splits_read(method: Method, scale: Fixed | Search, router: Router) -> list[str]:
    """What a cell reads beside the split that it scores, known before: it searches on some, or learns from some."""
    searched = [scale.split] if isinstance(scale, Search) else []
    learned = [router.split] if isinstance(router, Learned) else []
    return [*dict.fromkeys([*searched, *learned, *splits_of(method)])]


def without_entropy(suite: Suite, method: Method, router: Router) -> list[str]:
    """Tasks that add nothing where a method or its router learns by entropy or pseudo-labels: heads of one output."""
    if not any(isinstance(term, Entropy | MarginalEntropy | PseudoLabels) for term in terms_of(method, router)):
        return []
    return [task.name for task in suite.tasks if not task.classes and task.head() is not None]


def summary_line(row: Row) -> str:
    """One line about a finished row."""
    text = f"mean score {100 * sum(row.accuracy.values()) / len(row.accuracy):.1f} %"
    if known := [score.value for score in row.unseen.values() if score is not None]:
        text += f", of unseen tasks {100 * sum(known) / len(known):.1f} %"
    if row.routing:
        routed = row.routing.get("accuracy", {}).values()
        text += f", routing accuracy {100 * sum(routed) / len(routed):.1f} %"
    if row.collapsed:
        text += f", suspected of collapse: {', '.join(row.collapsed)}"
    return text + f", {', '.join(f'{phase} {seconds:.1f} s' for phase, seconds in row.seconds.items())}"
