"""Private matrices of samples, some rows at a time."""

import pytest
import torch
from test_deltas import KINDS, delta, weights_of

from merging.deltas import Grouped, Masked, Rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 3, 9])
def test_mixes_are_those_of_all_rows(kind, samples):
    found, changes = delta(kind)
    w = weights_of(2)[0]
    w[:, 1] = 0
    pieces = [*found.mixes(w, samples)]
    assert [len(piece) for piece in pieces] == [len(some) for some in w.split(samples)]
    torch.testing.assert_close(torch.cat(pieces), torch.einsum("bt,tmn->bmn", w, changes), rtol=0, atol=1e-12)
    assert not torch.cat([*found.mixes(0 * w, samples)]).any()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_change_is_unpacked_once_for_all_rows(axis, monkeypatch):
    asked, part = [], Masked.part
    monkeypatch.setattr(Masked, "part", lambda found, index: asked.append(index) or part(found, index))
    blocks = Rows([delta("Masked")[0], Grouped(delta("Masked", 2)[0], [1, 0, 1])], axis)
    w = weights_of(2)[0]
    w[:, 2] = 0
    pieces = [*blocks.mixes(w, 1)]
    assert asked == [0, 1, 0, 1] and len(pieces) == len(w)
