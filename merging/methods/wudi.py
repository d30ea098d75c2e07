from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from merging.context import ALONE, Context
from merging.experts import Experts
from merging.interference import Matrices, Rest, by_matrix, of_task_vectors
from merging.merged import Merged
from merging.options import Options, Rate, Within


@dataclass(frozen=True)
class Wudi(Options):
    """WUDI-Merging: for every matrix the change that interferes least with the row spaces of all task vectors.

    Cheng et al., 2025, arXiv 2503.08099. From tau = sum_t tau_t on, Adam lowers sum_t |(tau - tau_t) tau_t^T|^2 /
    |tau_t|^2, without data. steps, lr: where it stops is a regulariser; the exact minimum is worse. Of an entry Adam
    moves about steps lr = 0.003 at most, however large task vectors are: among large ones, such as those of LoRA
    experts with a high learning rate, the result is nearly their sum, which without a coefficient can score below the
    base (as the authors' own steps do there). scale: of the whole change; null is no coefficient (the authors').
    matrices: "linear", those of attention and FFNs (the authors'); "all", every matrix. rest: all other parameters stay
    those of the "base" (the authors'), or take the "mean" of the task vectors. split_qkv is an option of the experts.
    """

    steps: Annotated[int, Within(0, 10**6)] = 300
    lr: Rate = 1e-5
    matrices: Matrices = "linear"
    rest: Rest = "base"
    scale: float | None = None
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        def solve(key: str, tau: Tensor) -> Tensor:
            return least_interference(tau, self.steps, self.lr)

        return experts.merged(by_matrix(experts, context, solve, self.matrices, self.rest), self.scale)


def least_interference(tau: Tensor, steps: int, lr: float) -> Tensor:
    """`steps` of Adam at `lr` on sum_t |(x - tau_t) tau_t^T|^2 / |tau_t|^2, from x = sum_t tau_t [m, n] on."""
    return of_task_vectors(tau).descended(steps, lr)
