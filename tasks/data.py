"""What a suite hands to methods and fits through a context: its inputs, labels and scores, all read when asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from merging.backbones.base import Backbone
from merging.calibration import Calibration
from merging.checkpoints import Checkpoint
from merging.errors import UserError
from merging.merged import Merged
from tasks.engine import Engine
from tasks.evaluate import ENGINE, Grid, Scores
from tasks.suite import Suite, calibration


@dataclass(frozen=True)
class SuiteData:
    """merging.context.Data of a suite. `trained` makes the model of all tasks, where there is one."""

    suite: Suite
    backbone: Backbone
    engine: Engine = ENGINE
    trained: Callable[[], Checkpoint] | None = None

    @cached_property
    def _unlabelled(self) -> dict[str, Calibration]:
        return {}

    def unlabelled(self, split: str) -> Calibration:
        """The inputs of every task."""
        if split not in self._unlabelled:
            how = self.engine.torch_device, self.engine.precision
            self._unlabelled[split] = calibration(self.suite, self.backbone, split, *how)
        return self._unlabelled[split]

    def labels(self, split: str) -> Sequence[Tensor]:
        """int64 [n] of every task."""
        return [task.split(split).labels.to(self.engine.torch_device) for task in self.suite.tasks]

    def validate(self, merged: Merged) -> Scores:
        """Scores on validation."""
        return Grid(self.suite, self.backbone, self.engine).score(merged, "val").scores

    @cached_property
    def _trained(self) -> Checkpoint:
        if self.trained is None:
            raise UserError(
                "multitask is no merge: it is a model trained on the data of all tasks, and these experts come without "
                "one. Open them with it, or choose a method that merges."
            )
        return self.trained()

    def multitask(self) -> Checkpoint:
        """The model trained on the data of all tasks. Raises UserError where there is none."""
        return self._trained
