"""An adapter says which base it was trained on: the Hub's models by their ids, folders by content, others are told."""

import json

import pytest
import torch
from safetensors.torch import save_file

from merging import UserError
from merging.checkpoints import StateDict
from merging.checkpoints.base_names import check_base
from merging.checkpoints.opening import open_file

IN_CACHE = "hub/models--meta--Llama-3-8B/snapshots/0a1b"


@pytest.fixture
def base(tmp_path):
    """Opens a model that is put into a folder, with a configuration that may name it too."""

    def put(where, name=None, value=0.0):
        folder = tmp_path / where
        folder.mkdir(parents=True)
        save_file({"w": torch.full((2,), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({} if name is None else {"_name_or_path": name}))
        return open_file(folder)

    return put


@pytest.mark.parametrize(
    ("where", "name", "named"),
    [
        (IN_CACHE, None, "meta/Llama-3-8B"),
        (IN_CACHE, None, "Meta/llama-3-8b"),
        (IN_CACHE, None, "/other/home/hub/models--meta--Llama-3-8B/snapshots/9f9f"),
        (IN_CACHE, None, "/cluster/Llama-3-8B"),
        ("hub/models--gpt2/snapshots/1", None, "openai-community/gpt2"),
        ("models/Llama-3-8B", None, "meta/Llama-3-8B"),
        ("models/copy", "meta/Llama-3-8B", "meta/Llama-3-8B"),
        ("models/copy", None, None),
    ],
)
def test_names_of_one_model(base, where, name, named):
    assert check_base("adapter", named, base(where, name)) == ()


@pytest.mark.parametrize("named", ["meta/Llama-3-70B", "other/Llama-3-8B", "/x/models--meta--Llama-3-1B/snapshots/1"])
def test_another_model_of_the_hub(base, named):
    with pytest.raises(
        UserError, match=rf"adapter was trained on {named}, .* put on meta/Llama-3-8B .*other_base=true"
    ):
        check_base("adapter", named, base(IN_CACHE))


@pytest.mark.parametrize(("where", "named"), [("models/x", "meta/Llama-3-8B"), (IN_CACHE, "/cluster/llama/final")])
def test_what_names_do_not_tell_is_said(base, where, named):
    (remark,) = check_base("adapter", named, base(where))
    assert remark.startswith(f"trained on {named}, by its configuration; whether")


def test_folders_that_are_here_are_compared_by_content(base, tmp_path):
    origin, copy, other = base("models/x"), base("models/y"), base("models/z", value=1.0)
    assert check_base("adapter", str(copy.path.parent), origin) == ()
    assert check_base("adapter", str(origin.path.parent / "."), origin) == ()
    with pytest.raises(UserError, match=r"was trained on .*/models/z, .* and is put on x "):
        check_base("adapter", str(other.path.parent), origin)


def test_a_base_in_memory_has_no_name():
    assert check_base("adapter", "meta/Llama-3-8B", StateDict({})) == ()
