"""Gates: what they see, how they weigh it, and what they refuse."""

import math
from dataclasses import replace

import pytest
import torch
from routes import T, backbone, close, folded, gated, images, merge
from samples import BACKBONE, family, merged_of, tower
from torch import nn

from merging.errors import UserError
from merging.methods import Smile, TaskArithmetic, Wemoe
from merging.routing.gates import Gate, GateShape, Subspace, answered, largest, listening
from merging.routing.install import install

B, N, D, G = 6, 5, 8, 4  # samples, tokens, width, parts
AFTER = {"features": "mean", "pool": "after"}
SHAPES = [{"depth": depth, "features": seen} for depth in (1, 2, 3) for seen in ("mean", "mean_std", "cls")]
shapes = pytest.mark.parametrize("shape", [*SHAPES, {"depth": 1, **AFTER}, {"depth": 2, **AFTER}])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(init=0.3, **shape):
    """A gate of random weights, in fp64."""
    made = Gate(D, G, GateShape(**shape), init).double().eval()
    for index, tensor in enumerate(made.net.parameters()):
        tensor.data.copy_(drawn(*tensor.shape, seed=50 + index))
    made.standardise(made.features(drawn(20, N, D, seed=1)))
    return made


def same(first, second, atol=1e-12):
    return torch.allclose(first, second, rtol=0, atol=atol)


class TestTokens:
    @pytest.mark.parametrize(
        ("depth", "activation", "alike"), [(1, "none", True), (2, "none", False), (1, "softmax", False)]
    )
    def test_the_mean_goes_through_a_linear_gate_alone(self, depth, activation, alike):
        """Depth 1: mean then gate is gate then mean; a ReLU or a softmax between them tells the orders apart."""
        shape = {"depth": depth, "activation": activation, "features": "mean"}
        before, after = gate(**shape), gate(pool="after", **shape)
        after.load_state_dict(before.state_dict())
        x = drawn(B, N, D)
        assert same(before(x), after(x)) == alike
        assert same(before(x), after(x), 1e-3) == alike

    @shapes
    def test_the_order_of_tokens_behind_the_class_token_plays_no_role(self, shape):
        made, x = gate(**shape), drawn(B, N, D)
        assert same(made(x), made(x[:, [0, 3, 1, 4, 2]]))
        assert same(made(x), made(x[:, [1, 0, 2, 3, 4]])) == (shape["features"] != "cls")

    @shapes
    def test_a_sample_is_weighed_by_itself(self, shape):
        made, x = gate(activation="none", **shape), drawn(B, N, D)
        assert same(made(x), torch.cat([made(each[None]) for each in x]))
        assert not same(made(x)[0], made(x)[1], 1e-3)

    def test_features(self):
        x = drawn(B, N, D)
        deviation = ((x - x.mean(1, keepdim=True)) ** 2).sum(1).div(N).sqrt()
        assert same(gate(features="mean_std").features(x), torch.cat([x.mean(1), deviation], 1), 1e-10)
        assert torch.equal(gate(features="cls").features(x), x[:, 0])
        assert torch.equal(gate(features="mean").features(x), x.mean(1))
        assert torch.equal(gate(features="mean", granularity="token").features(x), x)

    def test_features_are_standardised_over_samples(self):
        made, features = gate(features="mean"), 3 + 5 * drawn(50, D)
        features[:, 2] = 7.0
        made.standardise(features)
        seen = []
        made.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        made.logits(features)
        varied = [i for i in range(D) if i != 2]
        assert same(seen[0].mean(0), torch.zeros(D).double())
        assert same(seen[0].square().mean(0)[varied], torch.ones(D - 1).double())
        assert torch.equal(seen[0][:, 2], torch.zeros(50).double())  # one that never varies says nothing
        assert not {"mean", "std"} & {name for name, _ in made.named_parameters()}

    def test_features_of_tokens_are_standardised_over_samples_and_tokens(self):
        made, x = gate(features="mean", pool="after"), drawn(B, N, D)
        made.standardise(x)
        assert same(made.mean, x.reshape(-1, D).mean(0)) and same(made.std, x.reshape(-1, D).std(0, correction=0))


class TestSize:
    """Golden numbers of the official code, ViT-B/32 with eight tasks."""

    @pytest.mark.parametrize(("depth", "params"), [(1, 73_824), (2, 7_160_928)])
    def test_wemoe(self, depth, params):
        one = Gate(768, 8, GateShape(depth=depth, features="mean", pool="after", activation="none"))
        assert 12 * sum(each.numel() for each in one.parameters()) == params

    def test_twin(self):
        one = Gate(768, 8, GateShape("pass", 3, "mean"))
        expected = 768 * 1536 + 1536 + 1536**2 + 1536 + 1536 * 8 + 8 + 2 * 2 * 1536
        assert sum(each.numel() for each in one.parameters()) == expected
        kinds = ["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"]
        assert [type(each).__name__ for each in one.net] == [*kinds, *kinds, "Linear"]

    def test_macs(self):
        assert Gate(768, 8, GateShape(depth=2, features="mean", pool="after")).macs(50) == 50 * (768**2 + 768 * 8)
        assert Gate(768, 8, GateShape(depth=2, features="mean")).macs(50) == 768**2 + 768 * 8
        assert Gate(768, 8, GateShape()).macs(50) == 2 * 768 * 8
        assert Gate(768, 8, GateShape(features="mean", granularity="token")).macs(50) == 50 * 768 * 8
        assert Gate(768, 8, GateShape("pass", 3, "mean")).macs(50) == 768 * 1536 + 1536**2 + 1536 * 8
        assert Subspace(torch.zeros(8, 16, 768)).macs(50) == 50 * 8 * 16 * 768


class TestActivations:
    def test_softmax_and_sigmoid(self):
        logits = drawn(B, G)
        powers = (logits / 0.5).exp()
        assert same(gate(temperature=0.5).weights(logits), powers / powers.sum(1, keepdim=True))
        assert same(gate(activation="sigmoid").weights(logits), 1 / (1 + (-logits).exp()))
        assert torch.equal(gate(activation="none", temperature=2.0).weights(logits), logits / 2)

    def test_soft_top_k(self):
        """Rank-one MoE: s times sigmoid(100 (s - s_(k))), so that the k-th itself is halved."""
        made, logits = gate(activation="soft_top_k", top_k=2), drawn(B, G)
        for row, found in zip(logits.tolist(), made.weights(logits).tolist(), strict=True):
            second = sorted(row)[-2]
            expected = [s / (1 + math.exp(-100 * (s - second))) for s in row]
            assert found == pytest.approx(expected, abs=1e-12)
            assert found[row.index(second)] == pytest.approx(second / 2)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9])
    @pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
    def test_the_largest_share_the_sum_of_all(self, activation, top_k):
        logits = drawn(B, G)
        every, kept = (gate(activation=activation, top_k=k).weights(logits) for k in (None, top_k))
        for whole, some in zip(every, kept, strict=True):
            best = whole.argsort(descending=True)[:top_k]
            assert set(some.nonzero()[:, 0].tolist()) == set(best.tolist())
            assert same(some[best], whole[best] * whole.sum() / whole[best].sum())

    def test_hard_routing_is_exactly_one_hot(self):
        logits = torch.randn(2000, G, generator=torch.Generator().manual_seed(0))
        weights = gate(top_k=1, temperature=0.7).weights(logits)
        assert torch.equal(weights, nn.functional.one_hot(logits.argmax(1), G).float())

    def test_of_real_weights_the_largest_stay_as_they_are(self):
        logits = torch.tensor([[0.5, -2.0, 1.5, -0.1], [0.0, 0.0, 0.0, 0.0]])
        assert torch.equal(gate(activation="none", top_k=2).weights(logits)[0], torch.tensor([0.5, 0, 1.5, 0]))
        assert gate(activation="none", top_k=2).weights(logits).isfinite().all()
        assert torch.equal(largest(logits, 4), logits)

    @pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
    def test_gradients_reach_those_kept(self, activation):
        logits = drawn(1, G).requires_grad_()
        kept = gate(activation=activation, top_k=2).weights(logits)
        kept[0].max().backward()
        assert bool((logits.grad != 0)[kept != 0].any()) and logits.grad.isfinite().all()


class TestStart:
    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("activation", ["none", "soft_top_k"])
    def test_real_weights_start_at_the_initial_weight(self, activation, depth):
        """Published: weights of deviation 0.01, hidden bias 0, last bias lambda."""
        torch.manual_seed(0)
        made = Gate(D, G, GateShape(depth=depth, features="mean", activation=activation), init=0.3)
        assert torch.equal(made.net[-1].bias, torch.full((G,), 0.3)) and 0.003 < made.net[0].weight.std() < 0.02
        assert depth == 1 or not made.net[0].bias.any()
        nn.init.zeros_(made.net[-1].weight)
        assert torch.allclose(made(drawn(B, N, D).float()), torch.full((B, G), 0.3))

    def test_others_start_undecided(self):
        for activation, expected in (("softmax", 1 / G), ("sigmoid", 0.5)):
            made = Gate(D, G, GateShape(activation=activation, features="mean"), init=0.3)
            nn.init.zeros_(made.net[-1].weight)
            assert torch.allclose(made(drawn(B, N, D).float()), torch.full((B, G), expected))

    @pytest.mark.parametrize("sees", ["block", "early", "pass"])
    def test_a_gate_without_weights_is_the_folded_model(self, sees):
        """W0 + lambda sum_t delta_t + static for every input."""
        merged = gated(sees, activation="none")
        for each in merged.routing.gates:
            nn.init.zeros_(each.net[-1].weight)
            nn.init.constant_(each.net[-1].bias, 0.4)
        with torch.inference_mode():
            found = install(backbone().build(), merged)(images())
        close(found, folded(merged, images(), [torch.full((T,), 0.4)] * len(found)), 1e-5)

    def test_an_untrained_wemoe_is_task_arithmetic(self):
        base, experts = family(3, tower(), size=0.25, spread=0.0625)
        merged, plain = merged_of(Wemoe(init=0.3), base, experts), BACKBONE.build()
        plain.load_state_dict(dict(merged_of(TaskArithmetic(0.3), base, experts).state()))
        shape = GateShape(depth=2, features="mean", pool="after", activation="none")
        gates = nn.ModuleList([Gate(16, 3, shape, merged.routing.init) for _ in range(2)])
        for each in gates:
            nn.init.zeros_(each.net[-1].weight)
        routing = replace(merged.routing, router="entropy", gate=shape, gates=gates)
        with torch.inference_mode():
            close(install(BACKBONE.build(), replace(merged, routing=routing))(images()), plain(images()).double(), 1e-5)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("sample", (B, G)), ("group", (B, G)), ("token", (B, N, G)), ("batch", (G,)), ("mixed", (G,))],
)
def test_granularity(granularity, shape):
    sees = "early" if granularity == "group" else "block"
    sample, other = gate(sees=sees, features="mean"), gate(sees=sees, features="mean", granularity=granularity)
    other.load_state_dict(sample.state_dict())
    x = drawn(B, N, D)
    expected = {"batch": sample(x).mean(0), "mixed": sample(x).mean(0), "token": sample(x.flatten(0, 1)[:, None])}
    assert other(x).shape == shape and same(other(x), expected.get(granularity, sample(x)).reshape(shape))


def test_subspace_equals_the_published_gate():
    """Lengths inside the leading directions, without singular values; softmax over tasks; top-k, to sum 1."""
    directions, x = drawn(G, 2, D), drawn(B, N, D, seed=3)
    for top_k in (1, 2, G):
        with listening() as heard:
            found = Subspace(directions, top_k)(x)
        assert heard[0] is not None and found.shape == (B, N, G)
        for token, w in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
            lengths = [math.sqrt(sum(float(row @ token) ** 2 for row in part)) for part in directions]
            best = sorted(range(G), key=lengths.__getitem__)[-top_k:]
            powers = [math.exp(length) if t in best else 0.0 for t, length in enumerate(lengths)]
            assert w.tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-10)


def test_listeners_hear_their_own_thread_of_events():
    with listening() as outer:
        answered(torch.ones(1))
        with listening() as inner:
            answered(torch.zeros(2).requires_grad_())
        answered(torch.ones(3))
    answered(torch.ones(4))
    assert [len(each) for each in outer] == [1, 3] and len(inner) == 1 and not inner[0].requires_grad


class TestNotFinite:
    @pytest.mark.parametrize("sees", ["block", "early", "pass"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_gate(self, sees, value):
        merged = gated(sees, activation="none")
        merged.routing.gates[0].net[0].bias.data[1] = value
        model = install(backbone().build(), merged)
        with pytest.raises(UserError, match=r"A gate gives NaN or Inf.*lower router.train.lr"):
            model(images())

    def test_images(self):
        base, experts = family(3, tower(), size=0.25, spread=0.0625)
        smile = install(BACKBONE.build(), merged_of(Smile(8, 2), base, experts))
        for model in (smile, install(backbone().build(), gated("early"))):
            with pytest.raises(UserError, match="its input is not finite"):
                model(images() * math.nan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sees": "head"}, r"gate.sees='head' is unknown. Choose one of block, early, pass"),
        ({"depth": 4}, r"gate.depth=4 is unknown. Choose one of 1, 2, 3"),
        ({"features": "max"}, r"gate.features='max' is unknown. Choose one of mean, mean_std, cls"),
        ({"pool": "never"}, r"gate.pool='never' is unknown. Choose one of before, after"),
        (
            {"activation": "relu"},
            r"gate.activation='relu' is unknown. Choose one of softmax, sigmoid, none, soft_top_k",
        ),
        ({"granularity": "patch"}, r"gate.granularity='patch' is unknown. Choose one of sample, token, batch"),
        ({"temperature": 0.0}, r"gate.temperature=0.0 is out of range: it must lie in"),
        ({"temperature": math.nan}, r"gate.temperature=nan is out of range"),
        ({"top_k": 0}, r"gate.top_k=0 is out of range: keep at least 1 part \(a whole number\), a share"),
        ({"groups": 0}, r"gate.groups=0 is out of range"),
        ({"points": "features"}, r"gate.points='features' is unknown. Choose one of logits, weights"),
        (
            {"pool": "after"},
            r"gate.features=mean_std pools the tokens, but pool=after .* Set router.gate.features=mean",
        ),
        ({"features": "cls", "granularity": "token"}, r"gate.features=cls pools the tokens, but .* granularity=token"),
        ({"depth": 3, "features": "mean", "pool": "after"}, r"gate.depth=3 normalises over samples .*depth=1 or 2"),
        ({"granularity": "group"}, r"granularity=group needs the weights of all samples .*sees=early or pass"),
        (
            {"sees": "early", "shared": True},
            r"sees=early is one gate for the whole model: set router.gate.shared=false",
        ),
        ({"sees": "pass", "features": "mean", "granularity": "token"}, r"sees=pass is one gate .*sees=block"),
    ],
)
def test_shapes_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=message):
        GateShape(**wrong)


def test_a_shape_is_its_facts():
    shape = GateShape("early", 2, "cls", temperature=0.5, top_k=3, granularity="group", groups=7, points="weights")
    assert GateShape(**shape.facts()) == shape and merge().routing is None
    older = {name: fact for name, fact in shape.facts().items() if name not in ("per_bin", "points")}
    assert GateShape(**older) == replace(shape, points="logits")  # a saved model from before these options
