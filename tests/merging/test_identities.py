"""An identity follows what an object is made of, and nothing else."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from merging.checkpoints import Known, StateDict
from merging.errors import UserError
from merging.identity import fingerprint, identity
from merging.methods import Ties


@dataclasses.dataclass(frozen=True)
class Source:
    share: float = 0.5
    where: str = dataclasses.field(default="here", metadata={"identity": False})
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Second:
    share: float = 0.5
    version: ClassVar[int] = 2


class Plain:
    def __init__(self, size):
        self.size, self._kept = size, object()


def test_fields_count_and_those_opted_out_do_not():
    assert identity(Source(where="there")) == identity(Source())
    assert identity(Source(0.25)) != identity(Source())
    assert identity(Source(inner=Source(where="there"))) == identity(Source(inner=Source()))


def test_the_class_and_its_version_count():
    first = identity(Second())
    assert first != identity(Source())
    Third = dataclasses.make_dataclass("Second", [("share", float, 0.5)], namespace={"version": 3}, frozen=True)
    Third.__module__, Third.__qualname__ = Second.__module__, Second.__qualname__
    assert first | {"version": 3} == identity(Third())


def test_a_class_of_this_library_may_move_to_another_module():
    assert identity(Ties())["class"] == "Ties" and identity(Second())["class"].endswith("test_identities.Second")


def test_contents_count_and_not_where_they_lie(tmp_path):
    one, other = tmp_path / "one.bin", tmp_path / "other.bin"
    for path in (one, other):
        path.write_bytes(b"the same")
    assert identity(one) == identity(other)
    other.write_bytes(b"not the same")
    assert identity(one) != identity(other)
    assert identity(Known("ab", (one,))) == identity(Known("ab", (other,))) == "ab"
    state = {"w": torch.arange(3.0)}
    assert identity(StateDict(state)) == StateDict(state, "another name").id


def test_tensors_count_by_dtype_shape_and_numbers():
    tensor = torch.arange(4.0)
    others = [tensor.double(), tensor.view(2, 2), tensor + 1]
    assert identity(tensor) == identity(tensor.clone()) and len({identity(each) for each in (tensor, *others)}) == 4
    assert identity([torch.float16, torch.device("cpu")]) == ["torch.float16", "cpu"]


def test_keys_of_mappings_have_no_order_and_lists_have_one():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2)) != fingerprint([2, 1])
    assert fingerprint(1) != fingerprint(1.0) != fingerprint(True)
    assert len(fingerprint(1, digits=12)) == 12 and fingerprint(1).startswith(fingerprint(1, digits=12))


def test_whatever_a_method_may_hold_is_json():
    held = {"mapping": Mapping, "call": partial(max, key=abs), "plain": Plain(3), "none": None, "set": {2, 1}}
    assert json.loads(json.dumps(identity(held))) == identity(held)
    assert identity(Plain(3)) == identity(Plain(3)) != identity(Plain(4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_named(value):
    with pytest.raises(UserError, match=rf"method\.keep\.1 is {value}, which is no finite number"):
        identity({"method": {"keep": [0.5, value]}})
    with pytest.raises(UserError, match=rf"inner\.share is {value}"):
        identity(Source(inner=Source(value)))


def test_what_does_not_say_what_it_is_made_of_is_refused():
    with pytest.raises(UserError, match="frozen dataclass"):
        identity(object())
