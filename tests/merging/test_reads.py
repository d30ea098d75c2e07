"""How often what a file holds is asked for."""

from collections import Counter
from dataclasses import replace

import pytest
from samples import family, tower

from merging import Experts
from merging.checkpoints import StateDict
from merging.checkpoints.key_maps import from_hugging_face, to_hugging_face
from merging.methods import Average, Emr, IsoC, TsvM

T = 3


class Counted(StateDict):
    """Counts how often a tensor is asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = Counter()

    def tensor(self, key):
        self.read[key] += 1
        return super().tensor(key)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("method", [Average(), TsvM(), IsoC(), Emr()], ids=lambda each: type(each).__name__)
def test_each_stored_tensor_is_read_once_a_merge(method, separate):
    """Of files that hold query, key and value apart, under Hugging Face's names, and methods that see one or three."""
    base, tuned = family(T, tower(), size=0.25, spread=0.0625)
    stored = []
    for state in (base, *tuned):
        del state["position_ids"]
        view = to_hugging_face(StateDict(state))
        stored.append(Counted({key: view.tensor(key) for key in view.specs()}))
    opened = Experts.open(from_hugging_face(stored[0]), [from_hugging_face(each) for each in stored[1:]])
    for each in stored:
        each.read.clear()
    method(replace(opened, separate_qkv=separate))
    for each in stored:
        assert each.read == dict.fromkeys(each.specs(), 1)
