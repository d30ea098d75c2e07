"""Hugging Face's and the task_vectors code's CLIPs under open_clip's names: the same features, the same bits back."""

import hashlib
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import drawn, equal
from torch import nn
from towers import PUBLISHED, SIZES, hugging_face, open_clip, pooled, scrambled, state, tower_of, whole

from merging import UserError
from merging.backbones.open_clip import PREFIX
from merging.checkpoints import SafetensorsFile, Spec, StateDict
from merging.checkpoints.key_maps import from_hugging_face, from_image_encoder, to_hugging_face
from merging.checkpoints.views import View, below, completed
from merging.qkv import fused_name, separated


def saved(model, folder):
    model.save_pretrained(folder, safe_serialization=True)
    return SafetensorsFile(folder / "model.safetensors")


def counts(checkpoint, prefix=""):
    specs = [spec for key, spec in checkpoint.specs().items() if key.startswith(prefix)]
    return len(specs), sum(spec.shape.numel() for spec in specs)


@pytest.mark.parametrize("size", SIZES)
class TestAgainstTransformers:
    def test_a_whole_model_gives_the_same_image_and_text_features(self, size, tmp_path):
        theirs = whole(size)
        ours = open_clip(SIZES[size])
        ours.load_state_dict(state(from_hugging_face(saved(theirs, tmp_path))), strict=True)
        images = SIZES[size].images()
        tokens = torch.randint(18, (4, 7), generator=torch.Generator().manual_seed(0))
        tokens[:, -1] = 18  # the end of the text, which both pool at
        with torch.inference_mode():
            torch.testing.assert_close(
                ours.encode_image(images), pooled(theirs.get_image_features(images)), atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                ours.encode_text(tokens), pooled(theirs.get_text_features(tokens)), atol=1e-5, rtol=1e-5
            )

    def test_a_vision_model_without_projection_gives_the_same_pooled_features(self, size, tmp_path):
        """The experts of the Hub: no projection in the file, it comes from the base."""
        theirs = scrambled(hugging_face(SIZES[size], whole=False))
        expert = from_hugging_face(saved(theirs, tmp_path))
        base = from_hugging_face(StateDict(whole(size).state_dict()))
        assert "visual.proj" not in expert.specs()
        complete = completed(expert, base, ["visual.proj", "visual.class_embedding"])
        tower = tower_of(SIZES[size])
        tower.load_state_dict(state(complete), strict=True)
        images = SIZES[size].images()
        with torch.inference_mode():
            features = theirs(images).pooler_output @ whole(size).visual_projection.weight.T
            torch.testing.assert_close(tower(images), features, atol=1e-5, rtol=1e-5)

    def test_there_and_back_bit_by_bit(self, size, tmp_path):
        stored = saved(whole(size), tmp_path)
        back = to_hugging_face(from_hugging_face(stored))
        assert equal(state(back), state(stored)) and dict(back.specs()) == dict(stored.specs())
        ours = scrambled(open_clip(SIZES[size])).state_dict()
        assert equal(state(from_hugging_face(to_hugging_face(StateDict(ours)))), ours)

    def test_what_we_write_is_what_transformers_has(self, size):
        names = to_hugging_face(StateDict(open_clip(SIZES[size]).state_dict())).specs()
        theirs = {key: each for key, each in whole(size).state_dict().items() if not key.endswith("position_ids")}
        assert {key: spec.shape for key, spec in names.items()} == {key: each.shape for key, each in theirs.items()}


@pytest.mark.parametrize(
    ("size", "vision", "encoder", "visual"),
    [
        ("B/32", (199, 87_456_000), (158, 113_448_705), (152, 87_849_216)),
        ("B/16", (199, 85_799_424), (158, 111_792_129), (152, 86_192_640)),
        ("L/14", (391, 303_179_776), (302, 342_562_049), (296, 303_966_208)),
    ],
)
def test_published_sizes(size, vision, encoder, visual):
    """Tensors and numbers of the published files, from the libraries' own classes at their true shapes."""
    with torch.device("meta"):
        expert = hugging_face(PUBLISHED[size], whole=False)
        clip = open_clip(PUBLISHED[size])
    del clip.transformer  # as ImageEncoder does
    family_a = StateDict({key: each for key, each in expert.state_dict().items() if "position_ids" not in key})
    family_b = StateDict({f"model.{key}": each for key, each in clip.state_dict().items()})
    assert counts(family_a) == vision and counts(family_b) == encoder
    assert counts(from_image_encoder(family_b)) == visual
    assert counts(from_image_encoder(family_b, text=True)) == encoder
    projection = from_image_encoder(family_b).specs()["visual.proj"]
    mapped = from_hugging_face(family_a).specs()
    assert {**mapped, "visual.proj": projection} == dict(from_image_encoder(family_b).specs())
    assert counts(to_hugging_face(from_image_encoder(family_b))) == (vision[0] + 1, visual[1])


class TestHuggingFace:
    @pytest.fixture
    def tensors(self):
        return {key: each.contiguous() for key, each in whole("small").state_dict().items()}

    @pytest.mark.parametrize("prefixed", [True, False])
    def test_a_vision_model_with_and_without_its_prefix(self, tensors, prefixed):
        kept = {key: each for key, each in tensors.items() if key.startswith(("vision_model.", "visual_projection."))}
        bare = {key if prefixed else key.removeprefix("vision_model."): each for key, each in kept.items()}
        visual = {key: each for key, each in state(from_hugging_face(StateDict(tensors))).items() if "visual." in key}
        assert equal(state(from_hugging_face(StateDict(bare))), visual)

    def test_query_key_and_value_are_stacked_in_that_order(self, tensors):
        start = "vision_model.encoder.layers.1.self_attn."
        fused = from_hugging_face(StateDict(tensors)).tensor(f"{PREFIX}transformer.resblocks.1.attn.in_proj_weight")
        for index, letter in enumerate("qkv"):
            assert torch.equal(fused[24 * index : 24 * index + 24], tensors[f"{start}{letter}_proj.weight"])

    def test_position_ids_are_dropped(self, tensors):
        older = {
            **tensors,
            "vision_model.embeddings.position_ids": torch.arange(5)[None],
            "text_model.embeddings.position_ids": torch.arange(7)[None],
        }
        assert equal(state(from_hugging_face(StateDict(older))), state(from_hugging_face(StateDict(tensors))))

    def test_nothing_is_read_before_it_is_asked_for(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "model.safetensors")
        stored = SafetensorsFile(tmp_path / "model.safetensors")
        view = from_hugging_face(stored)
        assert view.specs()["visual.proj"] == Spec(torch.Size((24, 12)), torch.float32)
        assert "_map" not in vars(stored)
        assert view.tensor("visual.proj").is_contiguous() and "_map" in vars(stored)
        view.release()
        assert view.id == stored.id and view.name == stored.name
        assert equal(load_file(stored.path), state(to_hugging_face(view)))

    @pytest.mark.parametrize(
        "key",
        [
            "vision_model.embeddings.patch_embedding.bias",
            "vision_model.encoder.layers.0.self_attn.in_proj.weight",
            "vision_model.encoder.layers.x.mlp.fc1.weight",
            "vision_model.encoder.layers.0.mlp.fc3.weight",
            "visual_projection.bias",
            "classifier.weight",
            "visual.proj",
            "optimizer.state",
        ],
    )
    def test_an_unknown_name_is_refused(self, tensors, key):
        with pytest.raises(UserError, match=rf"a state dict has {re.escape(key)}, which is no parameter"):
            from_hugging_face(StateDict({**tensors, key: torch.zeros(3)}))

    def test_a_missing_projection_is_named(self, tensors):
        missing = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
        with pytest.raises(UserError, match=f"lacks {re.escape(missing)}"):
            from_hugging_face(StateDict({key: each for key, each in tensors.items() if key != missing}))

    def test_the_same_parameter_twice(self, tensors):
        twice = {**tensors, "post_layernorm.bias": torch.zeros(24)}
        with pytest.raises(
            UserError, match=r"holds visual\.ln_post\.bias twice: as vision_model\.\S+ and as post_layernorm\.bias"
        ):
            from_hugging_face(StateDict(twice))

    def test_projections_that_do_not_fit_on_one_another(self, tensors):
        broken = {**tensors, "vision_model.encoder.layers.0.self_attn.v_proj.weight": torch.zeros(24, 23)}
        with pytest.raises(UserError, match=r"\(24, 24\), \(24, 24\), \(24, 23\) do not fit"):
            from_hugging_face(StateDict(broken))

    def test_half_precision_stays(self, tensors):
        half = {key: each.half() for key, each in tensors.items()}
        view = from_hugging_face(StateDict(half))
        assert all(spec == Spec(view.tensor(key).shape, torch.float16) for key, spec in view.specs().items())


@pytest.mark.parametrize("key", ["visual.conv1.bias", "transformer.resblocks.0.mlp.gelu.weight", "head.weight", "proj"])
def test_what_hugging_face_has_no_name_for_is_refused(key):
    with pytest.raises(UserError, match=f"has {re.escape(key)}, which is no parameter of open_clip's CLIP"):
        to_hugging_face(StateDict({key: torch.zeros(3)}))


class TestImageEncoder:
    @pytest.fixture
    def tensors(self):
        clip = scrambled(open_clip(SIZES["small"]))
        del clip.transformer
        return {f"model.{key}": each for key, each in clip.state_dict().items()}

    def test_the_tower_alone_unless_text_is_asked_for(self, tensors):
        bare = {key.removeprefix("model."): each for key, each in tensors.items()}
        visual = {key: each for key, each in bare.items() if key.startswith(PREFIX)}
        assert equal(state(from_image_encoder(StateDict(tensors))), visual)
        assert equal(state(from_image_encoder(StateDict(tensors), text=True)), bare)
        assert len(bare) - len(visual) == 6
        tower_of(SIZES["small"]).load_state_dict(state(from_image_encoder(StateDict(tensors))), strict=True)

    @pytest.mark.parametrize("key", ["model.visual.head.weight", "model.attn_mask", "classification_head.weight"])
    def test_an_unknown_name_is_refused(self, tensors, key):
        with pytest.raises(UserError, match=f"has {re.escape(key)}"):
            from_image_encoder(StateDict({**tensors, key: torch.zeros(2)}))


class TestOverlay:
    first, second = StateDict({"a": drawn(2)}), StateDict({"a": drawn(2, seed=1), "b": drawn(3), "c": drawn(1)})

    def test_only_what_is_missing_is_taken(self):
        overlay = completed(self.first, self.second, ["a", "b"])
        assert equal(state(overlay), {"a": drawn(2), "b": drawn(3)})
        assert overlay.specs()["b"].shape == (3,)
        assert overlay.id == hashlib.sha256(f"{self.first.id} {self.second.id}".encode()).hexdigest()

    def test_nothing_missing_is_the_first(self):
        assert completed(self.first, self.second, ["a"]).id == self.first.id

    def test_a_key_that_neither_has(self):
        with pytest.raises(UserError, match="Neither a state dict nor a state dict has d"):
            completed(self.first, self.second, ["b", "d"])


class TestSeparate:
    def test_thirds_of_pytorch_s_own_attention(self):
        """What torch calls q_proj_weight where the sides differ: attention by three layers gives the same."""
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        fused = {f"attn.{key}": each.detach() for key, each in attention.state_dict().items()}
        apart = state(separated(StateDict(fused)))
        assert set(apart) == {f"attn.{letter}_proj_{kind}" for letter in "qkv" for kind in ("weight", "bias")} | {
            "attn.out_proj.weight", "attn.out_proj.bias"
        }  # fmt: skip
        x = drawn(3, 5, 8)
        layers = [x @ apart[f"attn.{letter}_proj_weight"].T + apart[f"attn.{letter}_proj_bias"] for letter in "qkv"]
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in layers)
        mixed = (q @ k.mT / 2).softmax(-1) @ v
        found = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(found, attention(x, x, x, need_weights=False)[0])

    def test_names(self):
        assert fused_name("visual.transformer.resblocks.3.attn.k_proj_bias").endswith("3.attn.in_proj_bias")
        assert fused_name("visual.proj") == "visual.proj"

    def test_a_matrix_that_is_no_stack(self):
        with pytest.raises(UserError, match=r"attn\.in_proj_weight of shape \(8, 4\).*not a multiple of 3"):
            separated(StateDict({"attn.in_proj_weight": torch.zeros(8, 4)}))

    def test_it_is_a_view(self):
        below = StateDict({"attn.in_proj_weight": drawn(6, 2), "w": drawn(2)})
        view = separated(below)
        assert isinstance(view, View) and view.id == below.id
        assert view.tensor("attn.k_proj_weight").data_ptr() == below.tensor("attn.in_proj_weight")[2:].data_ptr()


def test_the_image_tower_of_a_whole_model(tmp_path):
    view = from_hugging_face(saved(whole("deep"), tmp_path))
    tower_of(SIZES["deep"]).load_state_dict(state(below(view, PREFIX)), strict=True)
