"""Heads equal the definition, prompt by prompt, on a small text tower with random weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from merging import Cache
from merging.checkpoints import StateDict
from merging.errors import UserError
from tasks.evaluate import decided
from tasks.heads import text as heads
from tasks.heads.text import Text, text_of, zero_shot_head
from tasks.task import array_task

CLASSES = ("owl", "red fox", "2012 station wagon, seen from behind in the rain", "fox")
TEMPLATES = ("a photo of a {}.", 'the word "{}"', "{}")
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}


def clip(quick_gelu=True, width=128, scale=3.0):
    """A whole CLIP by open_clip."""
    from open_clip.model import CLIP

    torch.manual_seed(3)
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": 2}
    model = CLIP(24, VISION, text, quick_gelu=quick_gelu)  # type: ignore[arg-type]
    with torch.no_grad():
        model.logit_scale.fill_(scale)
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter) + 0.02)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return clip()


@torch.inference_mode()
def by_hand(model, classes, templates):
    """One prompt at a time, all 77 tokens, in single precision."""
    from open_clip import get_tokenizer

    tokenize, rows = get_tokenizer("ViT-B-32"), []
    for name in classes:
        each = [model.encode_text(tokenize([template.format(name)]))[0] for template in templates]
        mean = torch.stack([feature / feature.norm() for feature in each]).mean(0)
        rows.append(model.logit_scale.exp() * mean / mean.norm())
    return torch.stack(rows)


def test_a_head_is_what_its_definition_says(model, cache, monkeypatch):
    monkeypatch.setattr(heads, "PROMPTS", 5)  # batches that cut through classes
    found = zero_shot_head(StateDict(model.state_dict()), CLASSES, TEMPLATES, True, cache)
    want = by_hand(model, CLASSES, TEMPLATES)
    assert found.shape == (4, 24) and found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.norm(dim=1)[0]))
    torch.testing.assert_close(found.norm(dim=1), torch.full((4,), 3.0).exp())
    assert functional.normalize(found, dim=1)[0] @ functional.normalize(found, dim=1)[2] < 0.9999


def test_the_activation_matters(model, cache):
    plain = zero_shot_head(StateDict(model.state_dict()), CLASSES, TEMPLATES, False, cache)
    want = by_hand(clip(quick_gelu=False), CLASSES, TEMPLATES)
    torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-5 * float(want.norm(dim=1)[0]))
    assert not torch.equal(plain, zero_shot_head(StateDict(model.state_dict()), CLASSES, TEMPLATES, True, cache))


def test_only_the_text_tower_is_read(model, cache):
    read = set()

    class Watched(StateDict):
        def tensor(self, key):
            read.add(key)
            return super().tensor(key)

    zero_shot_head(Watched(model.state_dict()), CLASSES, TEMPLATES, True, cache)
    assert read == {key for key in model.state_dict() if not key.startswith("visual.")}


def test_heads_are_cached_by_content(model, cache, monkeypatch):
    state, made = StateDict(model.state_dict()), []
    real = heads.build_tower
    monkeypatch.setattr(heads, "build_tower", lambda *given: made.append(1) or real(*given))
    ask = lambda text=state, classes=CLASSES, templates=TEMPLATES, gelu=True: zero_shot_head(  # noqa: E731
        text, classes, templates, gelu, Cache(cache.folder)
    )
    first = ask()
    assert torch.equal(ask(), first) and len(made) == 1
    other = StateDict({**model.state_dict(), "logit_scale": torch.tensor(2.0)})
    changed = [ask(classes=CLASSES[::-1]), ask(templates=TEMPLATES[:2]), ask(gelu=False), ask(text=other)]
    assert len(made) == 5
    assert torch.equal(changed[0], first.flip(0)) or torch.allclose(changed[0], first.flip(0), rtol=1e-6)


def test_templates_need_a_place_for_the_name(model, cache):
    for templates in ((), ("a photo",)):
        with pytest.raises(UserError, match=r"need one entry or more, each with {}"):
            zero_shot_head(StateDict(model.state_dict()), CLASSES, templates, True, cache)


def test_braces_in_a_class_name_are_letters(model, cache):
    found = zero_shot_head(StateDict(model.state_dict()), ["{0} {}"], ["a {}."], True, cache)
    assert found.shape == (1, 24)


def test_weights_without_a_text_tower_are_refused(model, cache):
    vision = StateDict({key: value for key, value in model.state_dict().items() if key.startswith("visual.")}, "x.st")
    with pytest.raises(UserError, match=r"x.st holds no text tower of a CLIP"):
        zero_shot_head(vision, CLASSES, TEMPLATES, True, cache)


def test_backbones_know_their_text_towers(tmp_path):
    assert text_of("clip_vit_l14") == Text("model.safetensors", "openai/clip-vit-large-patch14")
    given = {"repo": "me/clip", "filename": "clip.safetensors", "revision": "abc"}
    assert text_of(given) == Text("clip.safetensors", "me/clip", "abc")
    (tmp_path / "clip.safetensors").touch()
    assert text_of(str(tmp_path / "clip.safetensors")).repo is None
    with pytest.raises(UserError, match=r"no text tower for 'mini_clip'.*backbone=clip_vit_b32"):
        text_of("mini_clip")
    with pytest.raises(UserError, match=r"suite.text has repository"):
        text_of({"repository": "a/b"})


def test_a_hugging_face_file_gives_the_same_head(model, cache, tmp_path):
    """Written by this library's own map to that layout, read from the file."""
    from safetensors.torch import save_file

    from merging.checkpoints.key_maps import to_hugging_face

    foreign = to_hugging_face(StateDict(model.state_dict()))
    path = tmp_path / "model.safetensors"
    save_file({key: foreign.tensor(key).clone().contiguous() for key in foreign.specs()}, path)
    text = Text(str(path)).open(cache)
    found = zero_shot_head(text, CLASSES, TEMPLATES, True, cache)
    assert torch.equal(found, zero_shot_head(StateDict(model.state_dict()), CLASSES, TEMPLATES, True, cache))


def test_a_head_is_never_moved_in_inference_mode():
    """What is moved to a GPU in inference mode could not be learned through afterwards."""

    class Watched(nn.Linear):
        def to(self, *arguments, **options):
            moved.append(torch.is_inference_mode_enabled())
            return super().to(*arguments, **options)

    moved: list[bool] = []
    task = array_task("a", {"test": (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))}, Watched(3, 2))
    with torch.inference_mode():
        assert decided(task, torch.randn(2, 3))["predicted"].shape == (2,)
    assert moved == [False]
