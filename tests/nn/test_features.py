"""Random features against the kernels that they estimate: mean, variance, and what orthogonal directions change."""

import math

import pytest
import torch

from neurarium.errors import BadInput
from neurarium.nn.features import RFF, URF, ArcCos, Poly, PositiveExp, orthogonal_gaussian

D, DRAWS = 8, 2000
KINDS = {
    "cos": (URF, {"f": "cos", "scale": 1.2}),
    "sin": (URF, {"f": "sin"}),
    "relu": (URF, {"f": "relu", "smooth": 0.6}),
    "sampled": (URF, {"f": "gelu", "smooth": 0.6, "frequencies": 40}),
    "arccos0": (ArcCos, {"order": 0}),
    "arccos1": (ArcCos, {"order": 1}),
    "rff": (RFF, {"scale": 1.5}),
    "exp": (PositiveExp, {"scale": 1.5}),
    "poly": (Poly, {"degree": 2}),
}


def point():
    generator = torch.Generator().manual_seed(3)
    x, w = (0.7 * torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0) for _ in range(2))
    return x, w, torch.tensor(0.4)


def draws(kind, m=4, n=DRAWS, orthogonal=False):
    """n independent estimates, by one set of n m features where the directions are independent."""
    cls, options = KINDS[kind]
    x, w, b = point()
    if kind == "sampled" or orthogonal:
        features, generator = cls(D, m, orthogonal=orthogonal, **options), torch.Generator().manual_seed(0)
        found = []
        for _ in range(n):
            features.redraw(generator)
            found.append(features.psi(w, b) @ features.phi(x))
        return torch.stack(found), features
    features = cls(D, m * n, orthogonal=False, **options)
    return n * (features.psi(w, b) * features.phi(x)).view(n, m).sum(1), cls(D, m, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_unbiased_and_has_the_closed_forms_variance(kind):
    found, features = draws(kind, n=500 if kind == "sampled" else 10 * DRAWS)
    mean, error = found.mean().item(), found.std().item() / math.sqrt(len(found))
    assert mean == pytest.approx(features.kernel(*point()).item(), abs=4 * error)
    if kind != "sampled":  # there the variance is given the frequencies
        assert found.var().item() == pytest.approx(features.variance(*point()).item(), rel=0.25)


def test_kernels_are_what_they_say():
    x, w, b = point()
    z, u, v = w @ x + b, torch.cat([x, torch.ones(1)]), torch.cat([w, b[None]])
    angle = math.acos((u @ v / (u.norm() * v.norm())).item())
    expected = {
        "cos": z.cos(), "sin": z.sin(), "exp": (u @ v / 1.5**2).exp(), "poly": (u @ v) ** 2, "rff": (-(u - v).norm() ** 2 / 4.5).exp(),
        "arccos0": (math.pi - angle) / (2 * math.pi),
        "arccos1": u.norm() * v.norm() / (2 * math.pi) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)),
    }  # fmt: skip
    for kind, value in expected.items():
        cls, options = KINDS[kind]
        assert cls(D, 3, **options).kernel(x, w, b).item() == pytest.approx(float(value), rel=1e-4), kind


@pytest.mark.parametrize("f", ["relu", "gelu", "tanh", torch.sigmoid])
def test_the_spectrum_gives_back_the_windowed_function(f):
    features, z = URF(1, 2, f, window=2.0), torch.linspace(-6, 6, 41)
    exact = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}.get(f, f)(z) * torch.exp(-(z**2) / 8)
    torch.testing.assert_close(features.kernel(z[:, None], torch.ones(1)), exact, atol=0.01 if f == "relu" else 2e-3, rtol=0)
    smooth = URF(1, 2, f, window=2.0, smooth=0.5)
    fine = torch.linspace(-14, 14, 5601)
    kernel = torch.exp(-((fine - 0.3) ** 2) / 0.5) / math.sqrt(0.5 * math.pi)
    values = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}.get(f, f)(fine) * torch.exp(-(fine**2) / 8)
    convolved = (kernel * values).sum() * 0.005
    assert smooth.kernel(torch.tensor([0.3]), torch.ones(1)).item() == pytest.approx(convolved.item(), abs=1e-3)


def test_the_sign_in_psis_exponent_is_plus():
    """With conjugated squares the estimate of cos would shrink by exp(-|w|^2)."""
    features = URF(4, 40_000, "cos")
    w = torch.tensor([0.6, 0.0, 0.8, 0.0])
    assert (features.psi(w, torch.tensor(0.0)) @ features.phi(torch.zeros(4))).item() == pytest.approx(1.0, abs=0.03)


def test_orthogonal_rows_are_orthogonal_and_gaussian():
    g = orthogonal_gaussian(20, 8, torch.Generator().manual_seed(0))
    gram = g[:8] @ g[:8].T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4
    many = torch.cat([orthogonal_gaussian(8, 8, torch.Generator().manual_seed(i)) for i in range(1000)])
    assert many.mean(0).abs().max() < 0.06
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(8), atol=0.06, rtol=0)
    assert many.pow(4).mean().item() == pytest.approx(3, rel=0.05)  # unit rows rescaled by a constant would give 3 d / (d + 2)


@pytest.mark.parametrize("kind", ["exp", "rff", "arccos1"])
def test_orthogonal_directions_lower_the_variance(kind):
    apart = draws(kind, m=8, n=3000, orthogonal=True)[0].var()
    assert apart < KINDS[kind][0](D, 8, **KINDS[kind][1]).variance(*point())


def test_rff_has_the_statistics_of_scikit_learns_sampler():
    kernel_approximation = pytest.importorskip("sklearn.kernel_approximation")
    x = 0.5 * torch.randn(20, D)
    ours = RFF(D, 4000, scale=1.5, bias=False, orthogonal=False).phi(x)
    theirs = torch.tensor(kernel_approximation.RBFSampler(gamma=1 / 4.5, n_components=4000, random_state=0).fit_transform(x.numpy()))
    exact = torch.exp(-(torch.cdist(x, x) ** 2) / 4.5)
    for phi in (ours, theirs.float()):
        torch.testing.assert_close(phi @ phi.T, exact, atol=0.08, rtol=0)
    assert ours.square().mean().item() == pytest.approx(theirs.square().mean().item(), rel=0.02)


def test_a_seed_makes_the_directions_and_redraw_others():
    a, b = RFF(5, 7, seed=3), RFF(5, 7, seed=3)
    assert torch.equal(a.G, b.G) and torch.equal(a.phase, b.phase)
    a.redraw(torch.Generator().manual_seed(4))
    assert not torch.equal(a.G, b.G)
    assert not list(a.parameters())  # nothing of it is trained


def test_bad_settings_are_refused():
    for make in (lambda: ArcCos(4, 0), lambda: ArcCos(4, 2, order=3), lambda: URF(4, 2, "abs"), lambda: URF(4, 2, bias=True),
                 lambda: URF(4, 2, "relu", window=0), lambda: URF(4, 2, "relu", frequencies=0), lambda: Poly(4, 2, 0)):  # fmt: skip
        with pytest.raises(BadInput):
            make()
    with pytest.raises(BadInput, match="4 inputs"):
        ArcCos(4, 2).phi(torch.zeros(3, 5))
