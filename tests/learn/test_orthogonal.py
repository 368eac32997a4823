"""The update is the polar factor, the optimizer is torch's Muon where it should be, and cut entries are what the proximal step cuts."""

import copy

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from neurarium.errors import BadInput
from neurarium.learn.fit import Backprop
from neurarium.learn.orthogonal import (
    BUILTIN,
    CLASSIC,
    MUON,
    ROOT,
    Muon,
    coefficients_for,
    fit_coefficients,
    matrix_groups,
    newton_schulz,
    soft_threshold,
    spectra_for,
    spectral_error,
)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (3, 5, 7)])
def test_many_classic_steps_give_the_polar_factor(shape):
    x = gaussian(*shape)
    torch.testing.assert_close(newton_schulz(x, CLASSIC, steps=40), polar(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("coefficients", [MUON, *list(BUILTIN.values())[:2]])
def test_steps_keep_singular_vectors_and_map_values_by_the_polynomial(coefficients):
    x = gaussian(5, 8)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    p = s / (s.norm() + 1e-7)
    for _ in range(5):
        p = coefficients[0] * p + coefficients[1] * p**3 + coefficients[2] * p**5
    torch.testing.assert_close(u.mT @ newton_schulz(x, coefficients) @ vh.mT, torch.diag(p), rtol=0, atol=1e-10)


def test_soft_threshold_is_the_proximal_step_and_its_rest_the_clamp():
    v, eps = gaussian(5, 5), 0.4
    o = soft_threshold(v, eps)
    torch.testing.assert_close(v - o, v.clamp(-eps, eps), rtol=0, atol=1e-15)
    for value, got in zip(v.flatten().tolist(), o.flatten().tolist(), strict=True):
        # the problem is one convex problem an entry, split into two parts >= 0 so that it is smooth
        found = minimize(lambda ab, v=value: 0.5 * (v - ab[0] + ab[1]) ** 2 + eps * ab.sum(), [0.1, 0.1], bounds=[(0, None)] * 2).x
        assert got == pytest.approx(found[0] - found[1], abs=1e-4)
    torch.testing.assert_close(soft_threshold(v, torch.full((5, 1), eps, dtype=v.dtype)), o)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def train(model, optimizers, steps=6):
    x, y = gaussian(32, 12, dtype=torch.float32), torch.arange(32) % 5
    for _ in range(steps):
        for o in optimizers:
            o.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for o in optimizers:
            o.step()
    return model


def test_without_its_two_parts_it_is_torchs_muon_and_adamw(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # torch iterates in bfloat16
    ours, theirs = net(), net()
    groups = matrix_groups(ours)
    train(ours, [Muon(groups, lr=1e-2)])
    orth = [theirs[0].weight, theirs[2].weight]
    rest = [p for p in theirs.parameters() if all(p is not q for q in orth)]
    train(theirs, [
        torch.optim.Muon(orth, lr=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    ])  # fmt: skip
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def step_of(gradient, **settings):
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    ROOT([p], lr=1.0, weight_decay=0.0, scale=None, **settings).step()
    return -p.detach()


def test_the_cut_is_of_the_momentum_entries_and_is_what_the_docstring_says():
    g = gaussian(20, 30)
    g[3, 4] = 1e6
    eps = g.abs().flatten().sort().values[int(0.9 * 599)]
    want = newton_schulz(g.clamp(-eps, eps), MUON)
    torch.testing.assert_close(step_of(g, coefficients="muon"), want, rtol=0, atol=1e-6)
    clean = g.clone()
    clean[3, 4] = 0
    error = [(step_of(g, coefficients="muon", quantile=q) - polar(clean)).norm() for q in (0.9, None)]
    assert error[0] < 0.5 * error[1]


@pytest.mark.parametrize("quantile", [0.9, None])
def test_the_update_does_not_depend_on_the_scale_of_the_gradient(quantile):
    g = gaussian(8, 12)
    torch.testing.assert_close(step_of(g, quantile=quantile), step_of(1e4 * g, quantile=quantile), rtol=0, atol=1e-6)


def test_weight_decay_is_not_scaled_with_the_shape():
    p = nn.Parameter(torch.ones(4, 64))
    p.grad = torch.zeros(4, 64)
    ROOT([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.detach(), torch.full((4, 64), 0.95))


def test_batching_of_equal_shapes_and_convolutions():
    grads = [gaussian(6, 2, 3, 3, seed=i, dtype=torch.float32) for i in range(3)]
    together = [nn.Parameter(torch.zeros(6, 2, 3, 3)) for _ in grads]
    for p, g in zip(together, grads, strict=True):
        p.grad = g
    ROOT(together, lr=1.0).step()
    for p, g in zip(together, grads, strict=True):
        alone = nn.Parameter(torch.zeros(6, 18))
        alone.grad = g.view(6, 18)
        ROOT([alone], lr=1.0).step()
        torch.testing.assert_close(p.detach().view(6, 18), alone.detach(), rtol=0, atol=1e-6)


def test_state_dict_resumes_bit_for_bit():
    whole, broken = net(), net()
    o = ROOT(matrix_groups(whole), lr=1e-2)
    train(whole, [o], 3)
    train(whole, [o], 3)
    first = ROOT(matrix_groups(broken), lr=1e-2)
    train(broken, [first], 3)
    second = ROOT(matrix_groups(broken), lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(broken, [second], 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_the_learner_takes_it_with_groups():
    x, y = gaussian(64, 12, dtype=torch.float32), torch.arange(64) % 5
    model = net()
    history = Backprop(optimizer=ROOT, groups=matrix_groups).fit(model, [(x, y)], epochs=30)
    assert history.last["loss"] < 0.8 * history.train[0]["loss"]


@pytest.mark.parametrize(
    ("setting", "what"),
    [({"quantile": 1.0}, "quantile"), ({"lr": -1}, "lr"), ({"scale": "x"}, "scale"), ({"coefficients": "x"}, "coefficients")],
)
def test_refuses_settings_out_of_range(setting, what):
    with pytest.raises(BadInput, match=what):
        ROOT([nn.Parameter(torch.ones(2, 2))], **setting)


def test_refuses_sparse_gradients_and_vectors():
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(BadInput, match="sparse"):
        ROOT([p]).step()
    with pytest.raises(BadInput, match="matrices"):
        newton_schulz(torch.ones(3))


def test_groups_know_who_must_not_be_orthogonalised():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Embedding(7, 4)
            self.pos = nn.Parameter(torch.zeros(5, 4))
            self.conv = nn.Conv1d(4, 4, 3)
            self.norm = nn.LayerNorm(4)
            self.first, self.mid, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 7, bias=False)
            self.gate = nn.Linear(4, 1, bias=False)
            self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    model = Tiny()
    names = {p: n for n, p in model.named_parameters()}
    found = {g["role"]: {names[p] for p in g["params"]} for g in matrix_groups(model, {"^head": "output", "^gate": "vector"})}
    assert found == {
        "embedding": {"token.weight", "pos"}, "conv": {"conv.weight"}, "input": {"first.weight"}, "hidden": {"mid.weight"},
        "output": {"head.weight"}, "vector": {"conv.bias", "norm.weight", "norm.bias", "first.bias", "mid.bias", "gate.weight"},
    }  # fmt: skip
    assert [g["role"] for g in matrix_groups(model) if g["use_orth"]] == ["conv", "input", "hidden"]
    model.head.weight = model.token.weight  # tied: an embedding
    assert any(p is model.token.weight for g in matrix_groups(model) if g["role"] == "embedding" for p in g["params"])
    with pytest.raises(BadInput, match="role"):
        matrix_groups(model, {"head": "boss"})


def test_fit_beats_its_starts_and_stays_bounded():
    spectra = spectra_for((24, 96))
    fitted = fit_coefficients(spectra, iterations=400)

    def error(c):
        s = spectra.double()
        for _ in range(5):
            s = c[0] * s + c[1] * s**3 + c[2] * s**5
        return (s - 1).square().mean()

    assert error(fitted) < 0.8 * min(error(MUON), error(CLASSIC))
    s = torch.linspace(0, 1, 999, dtype=torch.float64)
    for _ in range(5):
        s = fitted[0] * s + fitted[1] * s**3 + fitted[2] * s**5
        assert s.abs().max() < 1.35
    # matrices and their spectra are the same question
    x = gaussian(4, 6, 9)
    spectra = torch.linalg.svdvals(x)
    assert fit_coefficients(x, iterations=20) == pytest.approx(fit_coefficients(spectra, iterations=20))
    with pytest.raises(BadInput, match="finite"):
        fit_coefficients(spectra * torch.nan)


@pytest.mark.parametrize("shape", [(32, 32), (64, 128), (64, 256), (128, 1024), (200, 200)])
def test_builtin_coefficients_are_closer_to_orthogonal_than_muons_on_fresh_spectra(shape):
    c = coefficients_for(shape)
    x = gaussian(8, *shape, seed=77, dtype=torch.float32)
    ours, theirs = spectral_error(newton_schulz(x, c)).mean(), spectral_error(newton_schulz(x, MUON)).mean()
    assert ours < 0.5 * theirs
    rank_one = x[:, :, :1] @ x[:, :, :1].mT + 1e-3 * torch.eye(shape[0])
    assert torch.linalg.matrix_norm(newton_schulz(rank_one, c), 2).max() < 1.4  # bounded where Gaussian fits are not


def test_coefficients_come_from_the_nearest_shape():
    table = {(16, 16): MUON, (16, 64): CLASSIC, (256, 1024): (1.0, 2.0, 3.0)}
    assert coefficients_for((40, 44), table=table) == MUON
    assert coefficients_for((90, 20), table=table) == CLASSIC
    assert coefficients_for((500, 2000), table=table) == (1.0, 2.0, 3.0)
    assert coefficients_for((2048, 8192)) == BUILTIN[(2048, 8192)]
    with pytest.raises(BadInput, match="empty"):
        coefficients_for((2, 2), table={})


def test_quantile_of_huge_matrices_is_sampled():
    from neurarium.learn.orthogonal import _quantile

    x = gaussian(1, 50_000, dtype=torch.float32).abs()
    assert float(_quantile(x, 0.9, most=5_000)) == pytest.approx(float(x.quantile(0.9)), rel=0.05)
    assert float(_quantile(x, 0.9)) == pytest.approx(float(x.quantile(0.9)), rel=1e-3)
