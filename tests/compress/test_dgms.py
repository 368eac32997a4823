"""The mixture's responsibilities, limits and gradients; k-means against brute force; the codebook against the plain layer."""

from __future__ import annotations

import copy
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import BitPlan, MixtureWeight, dgms, harden, plan_dgms, soften
from neurarium.compress.quant.mixture import codebook_product, kmeans_1d
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_kmeans_is_the_best_of_all_partitions(clusters: int) -> None:
    """In one dimension clusters are intervals: try all of them."""
    x = draw(14, seed=clusters).double().sort().values

    def error(parts: list[Tensor]) -> float:
        return sum(float(((p - p.mean()) ** 2).sum()) for p in parts)

    best = min(error(list(x.tensor_split(cut))) for cut in combinations(range(1, 14), clusters - 1))
    centres = kmeans_1d(x[torch.randperm(14, generator=torch.Generator().manual_seed(1))], clusters)
    assert abs(float((x[:, None] - centres).square().amin(1).sum()) - best) < 1e-10
    coarse = kmeans_1d(draw(900), 8, bins=200)
    fine = kmeans_1d(draw(900), 8, bins=900)
    loss = [float((draw(900).double()[:, None] - c).square().amin(1).sum()) for c in (coarse, fine)]
    assert loss[0] <= 1.01 * loss[1]
    assert kmeans_1d(torch.tensor([1.0, 3.0, 1.0]), 8).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_on_k_points_are_left_as_they_are(dtype: torch.dtype) -> None:
    points = torch.tensor([-0.3, 0.0, 0.07, 0.2], dtype=dtype)
    w = points[torch.randint(4, (6, 9), generator=torch.Generator().manual_seed(0))]
    mix = MixtureWeight(w, 4)
    torch.testing.assert_close(mix(w), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mix.eval()(w), w, rtol=1e-6, atol=1e-7)
    assert sorted(mix.codebook.tolist()) == pytest.approx(points.tolist())


def test_a_cold_assignment_is_the_argmax_and_component_zero_is_zero() -> None:
    w = draw(500)
    mix = MixtureWeight(w, 8, temperature=1e-4)
    gamma = mix.responsibilities(w)
    clear = gamma.sort(0).values[-2:].diff(dim=0)[0] > 0.01
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(mix(w)[clear], mix.eval()(w)[clear], rtol=1e-5, atol=1e-6)
    assert torch.equal(mix.codes(w), gamma.argmax(0))
    with torch.no_grad():
        mix.mean.add_(0.3)
    assert mix.codebook[0] == 0
    assert (mix(w)[mix.codes(w) == 0] == 0).all()
    assert set(mix(w).unique().tolist()) <= set(mix.codebook.tolist())


def test_the_gradient_of_the_soft_weight_is_that_of_its_definition() -> None:
    """Against numerical derivatives, and autograd through the plain formula; in chunks too."""
    w = draw(3, 4).double().requires_grad_()
    mix = MixtureWeight(w, 4, temperature=0.2).double()
    with torch.no_grad():
        mix.log_sigma.add_(0.7)  # overlapping components: every term counts
    torch.autograd.gradcheck(lambda *_: mix(w), (w, *mix.parameters()))

    def plain(w: Tensor) -> Tensor:
        density = mix.log_share.exp() * torch.distributions.Normal(mix.codebook, mix.log_sigma.exp()).log_prob(w[..., None]).exp()
        gamma = density / density.sum(-1, keepdim=True)
        return (gamma / mix.log_temperature.exp()).softmax(-1) @ mix.codebook

    torch.testing.assert_close(mix(w), plain(w))
    want = torch.autograd.grad((plain(w) ** 2).sum(), (w, *mix.parameters()))
    import neurarium.compress.quant.mixture as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 20)
        got = torch.autograd.grad((mix(w) ** 2).sum(), (w, *mix.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_narrow_components_do_not_underflow() -> None:
    """A component of width 1e-6: densities in float32 are zero or infinite, the responsibilities still sum to one."""
    mix = MixtureWeight(torch.tensor([0.0, 0.5, 1.0]), 2)
    with torch.no_grad():
        mix.log_sigma.fill_(-14.0)
    w = torch.tensor([0.4, 0.8], requires_grad=True)
    gamma = mix.responsibilities(w)
    torch.testing.assert_close(gamma.sum(0), torch.ones(2))
    mix(w).sum().backward()
    assert torch.isfinite(w.grad).all() and torch.isfinite(mix.log_sigma.grad).all()


def test_em_recovers_a_mixture_and_its_responsibilities_are_sklearns() -> None:
    g = torch.Generator().manual_seed(0)
    mean, sigma = torch.tensor([0.0, -2.0, 3.0]), torch.tensor([0.3, 0.5, 0.4])
    label = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 20_000, replacement=True, generator=g)
    x = (mean[label] + sigma[label] * torch.randn(20_000, generator=g)).double()
    mix = MixtureWeight(x, 3, init="em")
    order = mix.codebook.argsort()
    torch.testing.assert_close(mix.codebook[order].float(), mean.sort().values, rtol=0.01, atol=1e-9)
    torch.testing.assert_close(mix.log_sigma.exp()[order].float(), sigma[mean.argsort()], rtol=0.03, atol=0)
    mixture = pytest.importorskip("sklearn.mixture")
    peer = mixture.GaussianMixture(3, covariance_type="diag")
    peer.means_, peer.weights_ = mix.codebook.detach().numpy()[:, None], mix.log_share.detach().softmax(0).numpy()
    peer.covariances_ = mix.log_sigma.detach().exp().square().numpy()[:, None]
    peer.precisions_cholesky_ = peer.covariances_**-0.5
    want = torch.from_numpy(peer.predict_proba(x[:500, None].numpy())).T
    torch.testing.assert_close(mix.responsibilities(x[:500]), want, rtol=1e-6, atol=1e-9)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    x = draw(64, 1, 8, 8)
    return list(zip(x.split(16), (x.mean((1, 2, 3)) * 20).long().clamp(-1, 1).add(1).split(16), strict=True))


def test_the_packed_model_is_the_softened_one_in_eval_mode_bit_for_bit_and_smaller() -> None:
    model = network().eval()
    soft = soften(model, plan_dgms(model)).eval()
    hard = harden(soft)
    assert [type(m) for m in hard if hasattr(m, "weight") and m.weight.ndim > 1] == [nn.Conv2d, PackedConv2d, PackedLinear, nn.Linear]
    x = draw(5, 1, 8, 8)
    assert torch.equal(hard(x), soft(x))
    plain = copy.deepcopy(model)
    for name in ("3", "6"):
        plain.get_submodule(name).weight.data = hard.get_submodule(name).weight
        assert len(hard.get_submodule(name).weight.unique()) <= 16
    assert torch.equal(hard(x), plain(x))
    saved = stored_bytes(model) - stored_bytes(hard)
    weights = (model[3].weight.numel(), model[6].weight.numel())
    assert saved == sum(4 * n - -(-n // 2) for n in weights) - 2 * (16 + 1) * 4  # codes of half a byte, 16 values and a scale a layer


def test_adding_by_code_first_gives_the_same_product_with_k_multiplications() -> None:
    layer = harden(soften(network(), plan_dgms(network())))[6]
    x = draw(7, 54).double()
    from neurarium.compress import unpack

    codes = unpack(layer.codes, 4, 12 * 54).view(12, 54)
    torch.testing.assert_close(codebook_product(x, codes, layer.table.double()), x @ layer.weight.double().T)


def test_training_moves_weights_and_mixtures_and_lowers_the_loss() -> None:
    model, data = network(), batches()
    run = partial(dgms, model, data, components=4, lr=2e-2)
    before, after = run(epochs=0), run(epochs=15)
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    losses = [nn.functional.cross_entropy(m.eval()(x), y).item() for m in (before, after)]
    assert losses[1] < 0.8 * losses[0]
    assert not torch.equal(before[3].codes, after[3].codes)
    assert not torch.equal(before[3].table, after[3].table)
    assert (after[3].table == 0).any()
    assert after.plan.bits == {"3": (2, 32), "6": (2, 32)} and set(after.plan.skipped) == {"0", "8"}


def test_a_second_application_changes_nothing_and_plans_mix_bits() -> None:
    model = network()
    once = dgms(model, [], epochs=0)
    twice = dgms(once, [], epochs=0)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert twice.plan.bits == {}
    mixed = harden(soften(model, BitPlan({"0": (8, 32), "3": (2, 32)})))
    assert (mixed[0].bits, mixed[3].bits, type(mixed[6])) == (8, 2, nn.Linear)


def test_bad_input_is_named() -> None:
    model = network()
    for options, word in (
        ({"components": 5}, "components"), ({"temperature": 0.0}, "temperature"), ({"init": "x"}, "init"), ({"epochs": -1}, "epochs"),
        ({"skip": "all"}, "skip"), ({"skip": ["9"]}, "'9'"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            dgms(model, batches(), **options)
    with pytest.raises(BadInput, match="empty"):
        dgms(model, [])
    with pytest.raises(BadInput, match="not finite"):
        dgms(model, [(x * float("nan"), y) for x, y in batches()])
    with pytest.raises(UnsupportedModel, match="first layer"):
        dgms(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), batches())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[2].weight
    with pytest.raises(UnsupportedModel, match="tied"):
        dgms(tied, batches())
    with torch.no_grad():
        model[3].weight[0] = float("inf")
    with pytest.raises(BadInput, match="3: the weight"):
        dgms(model, batches())
