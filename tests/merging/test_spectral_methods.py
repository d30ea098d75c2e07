"""DC-Merge, OPCM, RESM and TSV-Compress against their published steps, and by algebra."""

import published_matrix as published
import pytest
import torch
from safetensors.torch import save_file
from samples import drawn, equal, family, models, opened, task_vectors, tower

from merging import UserError, merge
from merging.methods import DcMerge, Opcm, Resm, TsvCompress, TsvM

SHAPES = {"wide": (8, 20), "tall": (24, 9), "square": (10, 10), "b": (7,)}
FACTORS = 1e-5  # as in test_methods


def assert_change(method, base, experts, change, scale=1.0):
    for key, weight in merge(method, base, experts).state():
        assert torch.allclose(weight.double(), base[key] + scale * change[key], rtol=0, atol=FACTORS), key


def orthogonal(size, seed):
    return torch.linalg.qr(drawn(size, size, seed=seed).double())[0].float()


class TestDcMerge:
    @pytest.mark.parametrize("tasks", [1, 2, 3])
    @pytest.mark.parametrize("kept", [0.05, 0.4, 1.0])
    def test_published_steps(self, tasks, kept):
        base, experts = family(tasks, SHAPES)
        change = published.dc_merge(task_vectors(base, experts), kept, "none", 5.0, None)
        assert_change(DcMerge(kept=kept, scale=0.7), base, experts, change, 0.7)

    @pytest.mark.parametrize(("smoothing", "ratio"), [("average", 5.0), ("linear", 1.2), ("linear", 50.0)])
    def test_published_steps_for_adapters(self, smoothing, ratio):
        base, experts = family(3, SHAPES)
        change = published.dc_merge(task_vectors(base, experts), 0.3, smoothing, ratio, 2)
        assert_change(DcMerge(smoothing, ratio, 2, 0.3), base, experts, change)

    def test_one_task_is_itself_untrimmed_and_orthogonal_tasks_are_added_up(self):
        base, (expert,) = family(1, SHAPES)
        assert_change(DcMerge(kept=1.0), base, [expert], {k: v[0] for k, v in task_vectors(base, [expert]).items()})
        apart = torch.zeros(2, 8, 6)
        apart[0, :4, :3], apart[1, 4:, 3:] = drawn(4, 3), drawn(4, 3, seed=1)
        merged = merge(DcMerge(kept=1.0), {"w": torch.zeros(8, 6)}, [{"w": tau} for tau in apart])
        assert torch.allclose(merged.weight("w"), apart.sum(0), atol=FACTORS)

    def test_a_common_rotation_of_all_task_vectors_rotates_the_merge(self):
        tau, left, right = drawn(3, 9, 12), orthogonal(9, 1), orthogonal(12, 2)
        zero = {"w": torch.zeros(9, 12)}
        plain = merge(DcMerge(kept=0.1), zero, [{"w": t} for t in tau]).weight("w")
        turned = merge(DcMerge(kept=0.1), zero, [{"w": left @ t @ right} for t in tau]).weight("w")
        assert torch.allclose(turned, left @ plain @ right, atol=FACTORS)

    def test_smoothing_keeps_the_sum_of_the_singular_values(self):
        values = torch.tensor([5.0, 2.0, 1.0, 0.0])
        for method in (DcMerge("average"), DcMerge("linear"), DcMerge("linear", 1e6)):
            smooth = method.smoothed(values)
            assert float(smooth.sum()) == pytest.approx(8) and smooth[3] == 0
        assert torch.allclose(DcMerge("linear", 1e6).smoothed(values)[0], 5 * DcMerge("linear", 9).smoothed(values)[2])

    def test_bad_input(self):
        with pytest.raises(UserError, match="smoothing='max' is unknown"):
            DcMerge("max")
        with pytest.raises(UserError, match=r"ratio=0\.5 is out of range"):
            DcMerge(ratio=0.5)


ORDER = ["c", "a", "d", "b"]


class TestOpcm:
    @pytest.mark.parametrize("zero_diagonal", [False, True])
    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
    def test_published_steps(self, alpha, zero_diagonal):
        base, experts = family(4, SHAPES)
        method = Opcm(alpha, zero_diagonal, ORDER, matrices="all")
        change = published.opcm(task_vectors(base, experts), [2, 0, 3, 1], alpha, zero_diagonal)
        for key, weight in merge(method, base, experts, list("abcd")).state():
            assert torch.allclose(weight.double(), base[key] + change[key], rtol=0, atol=FACTORS), key

    def test_the_norm_is_the_mean_of_the_experts_and_one_task_is_itself(self):
        base, experts = family(3, tower())
        size = lambda model: torch.cat([(model[key] - base[key]).flatten() for key in tower()]).norm()  # noqa: E731
        (merged,), (alone,) = models(merge(Opcm(), base, experts)), models(merge(Opcm(), base, experts[:1]))
        assert size(merged) == pytest.approx(sum(size(expert) for expert in experts) / 3)
        assert all(torch.allclose(alone[key], experts[0][key], atol=1e-6) for key in alone)

    def test_what_is_added_is_orthogonal_to_the_merge_where_the_diagonal_is_dropped(self):
        experts, merged, tau = opened(*family(2, {"w": (6, 9)})), drawn(6, 9), drawn(6, 9, seed=1)
        added = Opcm(zero_diagonal=True, matrices="all")._cleaned(experts, "w", merged, tau)
        assert abs(float((added * merged).sum())) < 1e-4
        assert abs(float((Opcm(matrices="all")._cleaned(experts, "w", merged, tau) * merged).sum())) > 0.1

    @pytest.mark.parametrize("zero_diagonal", [False, True])
    def test_orthogonal_tasks_are_left_as_they_are(self, zero_diagonal):
        """Also with the diagonal dropped: it ends at the numerical rank."""
        experts = opened(*family(2, {"w": (8, 6)}))
        apart = torch.zeros(2, 8, 6)
        apart[0, :4, :3], apart[1, 4:, 3:] = drawn(4, 3), drawn(4, 3, seed=1)
        added = Opcm(zero_diagonal=zero_diagonal, matrices="all")._cleaned(experts, "w", *apart)
        assert torch.allclose(added, apart[1], atol=FACTORS)

    def test_the_order(self):
        base, experts = family(3, SHAPES)
        merged = lambda method, turn=1: models(  # noqa: E731
            merge(method, base, experts[::turn], ["a", "b", "c"][::turn])
        )[0]
        shuffled = Opcm(matrices="all", seed=3)
        assert equal(merged(shuffled), merged(Opcm(matrices="all", order=shuffled.ordered(["a", "b", "c"]))))
        assert equal(merged(shuffled), merged(shuffled, -1))
        one, other = (merged(Opcm(matrices="all", order=order)) for order in (["a", "b", "c"], ["c", "b", "a"]))
        assert not torch.allclose(one["wide"], other["wide"], atol=1e-2)
        assert len({tuple(Opcm(seed=seed).ordered(["a", "b", "c"])) for seed in range(20)}) > 2
        with pytest.raises(UserError, match=r"order has a, a, and the experts are a, b, c\. Name each once"):
            merged(Opcm(order=["a", "a"]))

    def test_a_saved_merge_goes_on(self, tmp_path):
        base, experts = family(4, SHAPES)
        paths = [tmp_path / f"{name}.safetensors" for name in ("base", *"abcd")]
        for path, state in zip(paths, (base, *experts), strict=True):
            save_file(state, path)
        method = Opcm(matrices="all", order=["a", "b", "c", "d"])
        whole = merge(method, paths[0], paths[1:], list("abcd"))
        first = merge(Opcm(matrices="all", order=["a", "b", "c"]), paths[0], paths[1:4], list("abc"))
        saved = first.save(tmp_path / "abc.safetensors")
        more = Opcm(matrices="all", continues="abc")
        again = merge(more, paths[0], [paths[4], saved], ["d", "abc"])
        for key, weight in whole.state():
            assert torch.allclose(again.weight(key), weight, atol=FACTORS), key
        assert str(again.provenance["opcm"]).startswith("{'experts': 4")
        with pytest.raises(UserError, match="was merged from another base"):
            merge(more, paths[1], [paths[4], saved], ["d", "abc"])
        with pytest.raises(UserError, match="is no merge of this method in one file"):
            merge(more, paths[0], [paths[4], paths[1]], ["d", "abc"])
        with pytest.raises(UserError, match="continues='abc' is no expert"):
            merge(more, paths[0], [paths[4]], ["d"])


class TestTsvCompress:
    @pytest.mark.parametrize("tasks", [1, 2, 3])
    def test_published_steps(self, tasks):
        base, experts = family(tasks, {**SHAPES, "cube": (3, 4, 5)})
        merged = merge(TsvCompress(), base, experts)
        for task, model in enumerate(models(merged)):
            for key, tau in task_vectors(base, experts).items():
                expected = tau[task]
                if tau.ndim == 3:
                    u, s, v = torch.linalg.svd(tau[task], full_matrices=False)
                    k = int(len(s) / tasks)
                    expected = u[:, :k] @ torch.diag(s[:k]) @ v[:k]
                    tail = 1 - float(s[k:].square().sum() / s.square().sum())
                    assert merged.energy[key][task] == pytest.approx(tail, abs=1e-5)
                assert torch.allclose(model[key].double(), base[key] + expected, rtol=0, atol=FACTORS), key

    def test_all_triplets_are_the_experts_and_the_share_of_bytes_is_known(self):
        base, experts = family(8, {"w": (64, 64)})
        delta = merge(TsvCompress(), base, experts).deltas["w"]
        assert delta.params == 8 * 64 * 64 / 4  # a quarter of eight matrices
        base, experts = family(3, SHAPES)
        for model, expert in zip(models(merge(TsvCompress(rank=100), base, experts)), experts, strict=True):
            assert all(torch.allclose(model[key], expert[key], atol=FACTORS) for key in model)


class TestResm:
    @pytest.mark.parametrize("tasks", [1, 2, 3])
    @pytest.mark.parametrize("sigmas", [0.5, 1.5])
    def test_equals_the_described_steps(self, tasks, sigmas):
        """Of tasks of unlike sizes, so that ranks and weights differ."""
        base, experts = family(tasks, SHAPES)
        for task, expert in enumerate(experts):
            expert.update({key: base[key] + (expert[key] - base[key]) * (1 + task) for key in SHAPES})
        change = published.resm(task_vectors(base, experts), sigmas)
        assert_change(Resm(sigmas=sigmas, scale=0.7), base, experts, change, 0.7)

    def test_equal_weights_and_ranks_are_tsv_merging(self):
        base, experts = family(3, SHAPES)
        equally, plain = (merge(m, base, experts) for m in (Resm("equal", "equal"), TsvM()))
        assert equal(models(equally)[0], models(plain)[0])

    def test_where_nothing_lies_far_out_all_weigh_alike(self):
        base, experts = family(3, SHAPES)
        far, alike = (merge(m, base, experts) for m in (Resm(sigmas=100.0), Resm(weights="equal")))
        assert equal(models(far)[0], models(alike)[0])

    def test_bad_input(self):
        for wrong in ({"weights": "none"}, {"ranks": "sparsity"}, {"sigmas": -1.0}):
            with pytest.raises(UserError, match=r"unknown|out of range"):
                Resm(**wrong)
