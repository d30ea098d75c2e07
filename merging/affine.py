"""Layers with their biases by least squares, from what goes into them in two models: sums over tasks, then a solution.

All around the base: changes of weights and biases, so that experts that are equal to the base change nothing at all.
"""

from typing import NamedTuple

from torch import Tensor

from merging.regression import SIZES, TINY, ZERO, Equations, Normaliser
from merging.statistics import Pair

EPS = 1e-8  # added to a ridge, and the least determinant of a norm's two equations


class Terms(NamedTuple):
    """Changes of a weight [m, n] and its bias [m], of norms [n] both; fp64. weight: the whole of an expert's."""

    tau: Tensor
    bias: Tensor
    weight: Tensor


class Layer(NamedTuple):
    """y = W x + b: W by normal equations, b by the means, each task divided by the size of its Gram matrix."""

    equations: Equations = Equations()
    sizes: Tensor = ZERO  # sum_t s_t, the inverse sizes
    inputs: Tensor = ZERO  # sum_t s_t x [n]
    outputs: Tensor = ZERO  # sum_t s_t times what the expert makes of its inputs, beyond W_0 x + b_0 [m]

    def plus(self, pair: Pair, expert: Terms, mix: float, normaliser: Normaliser) -> "Layer":
        """With a task whose expert is to be met on x + mix (y - x), of means per row."""
        size = SIZES[normaliser](pair.gram)
        moved = expert.tau @ pair.gram + mix * expert.weight @ pair.drift
        outputs = expert.bias + expert.tau @ pair.mean + mix * expert.weight @ pair.shift
        return Layer(
            self.equations.plus(pair.gram, moved, size),
            self.sizes + 1 / size,
            self.inputs + pair.mean / size,
            self.outputs + outputs / size,
        )

    def solved(self, anchor: Terms, ridge: float) -> tuple[Tensor, Tensor]:
        """Changes of weight and bias."""
        tau = self.equations.around(anchor.tau).regularised(ridge + EPS)
        return tau, (self.outputs - tau @ self.inputs + ridge * anchor.bias) / (self.sizes + ridge)


class Gain(NamedTuple):
    """y = g x + b of a norm, feature by feature, x being what it normalises."""

    energy: Tensor = ZERO  # sum_t of x^2 [n]
    mean: Tensor = ZERO  # sum_t of x
    scaled: Tensor = ZERO  # sum_t of x times what the expert makes of x, beyond the base's
    shifted: Tensor = ZERO  # sum_t of that itself
    tasks: int = 0

    def plus(self, pair: Pair, expert: Terms, mix: float, normaliser: Normaliser) -> "Gain":
        """With another task; both experts and merged model are met on x, and nothing is divided."""
        return Gain(
            self.energy + pair.gram,
            self.mean + pair.mean,
            self.scaled + pair.gram * expert.tau + pair.mean * expert.bias,
            self.shifted + pair.mean * expert.tau + expert.bias,
            self.tasks + 1,
        )

    def solved(self, anchor: Terms, ridge: float) -> tuple[Tensor, Tensor]:
        """Changes of gain and shift."""
        scaled, shifted = self.scaled + ridge * anchor.tau, self.shifted + ridge * anchor.bias
        energy, count = self.energy + ridge, self.tasks + ridge
        determinant = (energy * count - self.mean.square()).clamp_min(EPS)
        gain = (count * scaled - self.mean * shifted) / determinant
        return gain, (energy * shifted - self.mean * scaled) / determinant

    def without_shift(self, anchor: Terms, ridge: float) -> Tensor:
        """The change of the gain of a norm that shifts nothing."""
        return (self.scaled + ridge * anchor.tau) / (self.energy + ridge).clamp_min(TINY)
