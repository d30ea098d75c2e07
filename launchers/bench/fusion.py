"""One merge by the functions of FusionBench, where it is installed: `python fusion.py NAME OUTPUT BASE EXPERT ...`.

A script on its own: the Python that runs it needs fusion-bench and nothing of ours.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

from safetensors.torch import load_file, save_file
from torch import Tensor

WUDI_STEPS = 2  # of 300, which are hours on two cores; every step takes as long as the next
TITLES = {"IsoC": "IsoC", "TsvM": "TsvM", "Wudi": f"Wudi, {WUDI_STEPS} of 300 steps"}  # by the names of our classes


def function(name: str) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Theirs, from task vectors to one change."""
    if name == "Wudi":
        from fusion_bench.method.wudi.wudi import wudi_merging  # pyright: ignore

        return partial(wudi_merging, accelerator="cpu", iter_num=WUDI_STEPS)
    if name == "IsoC":
        from fusion_bench.method.isotropic_merging.iso_utils import iso_c  # pyright: ignore

        return partial(iso_c, accelerator="cpu")
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils  # pyright: ignore

    return partial(TSVM_utils.compute_and_sum_svd_mem_reduction, accelerator="cpu")


def main(name: str, output: str, *paths: str) -> None:
    """Prints seconds, imports left out."""
    merged = function(name)
    start = time.perf_counter()
    base, *experts = (load_file(path) for path in paths)
    change = merged([{key: expert[key] - weight for key, weight in base.items()} for expert in experts])
    save_file({key: (weight + change[key].detach()).contiguous() for key, weight in base.items()}, output)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
