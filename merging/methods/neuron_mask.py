from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from merging.context import ALONE, Context
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, call
from merging.methods.task_arithmetic import TaskArithmetic
from merging.neurons import Neurons


@dataclass(frozen=True)
class NeuronMask:
    """Keeps of each task's FFN change only the hidden neurons that its expert lives on, then merges what is left.

    A part of DuetMerging (CVPR 2026) in front of any method. Rows of the first layer with their biases, and
    columns of the second, are zeroed for all other neurons and scaled; every other parameter is untouched.
    neurons: which are kept, and the scale; a ratio of 1 changes nothing. then: the method that merges what is left.
    """

    neurons: Neurons = field(default_factory=Neurons)
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "inputs"

    def __post_init__(self) -> None:
        if self.neurons.joint:
            raise UserError(
                "neuron_mask: neurons.scale=learned fits the average of all tasks, which `then` need not take. Choose "
                "inverse_density, energy, density or none."
            )

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        if not experts.keys("ffn"):
            return call(self.then, experts, context)
        masks, row = self.neurons.masks(experts, context), {task: index for index, task in enumerate(experts.tasks)}

        def keep(key: str, task: str, tau: Tensor) -> Tensor:
            axis, block = experts.param(key).stored_axis, experts.param(key).block
            if axis is None or block is None or block not in masks:
                return tau
            if task not in row:
                raise UserError(
                    f"neuron_mask: then={type(self.then).__name__} merges {task}, no expert whose neurons were looked "
                    f"at. Choose a method that merges the experts, such as task_arithmetic or ties."
                )
            return self.neurons.apply(tau[None], masks[block][row[task], None], axis)[0]

        return call(self.then, experts.sparsified(keep), context)
