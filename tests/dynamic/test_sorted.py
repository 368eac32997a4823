"""SortedNet: the sampled objective, and that it sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.compile import split
from neurarium.dynamic.elastic import Config, ElasticFamily, ElasticLinear, Width, active, extract, full, grid
from neurarium.dynamic.samplers import Sorted
from neurarium.dynamic.slimmable import Slimmable
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.train import fit_policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.families import check_family


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(norm: str = "group") -> ElasticBackbone:
    return ElasticBackbone(classes=3, widths=(8, 12), strides=(2, 1), blocks=(0, 1), norm=norm)


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 3


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_all_draws_without_replacement_are_the_exact_sum():
    x, y = batch()
    model = net().double()
    x = x.double()
    policy = SortedNet(model, x, widths=(0.5, 1.0))
    policy.sampler = Sorted(policy.configs, len(policy.configs), replacement=False)
    policy.loss(x, y, 3).backward()
    got = grads(model)
    for config in policy.configs:
        with active(model, config):
            (nn.functional.cross_entropy(model(x), y) / len(policy.configs)).backward()
    want = grads(model)
    assert len(policy.configs) == 4 and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_draws_average_to_the_objective():
    """The estimate is unbiased: over many steps its mean is the mean over all configs."""
    x, y = batch()
    policy = SortedNet(net(), x, widths=(0.5, 1.0), accumulate=1)
    with torch.no_grad():
        each = torch.stack([nn.functional.cross_entropy(out, y) for out in policy.outputs(x)])
        drawn = torch.stack([policy.loss(x, y, step) for step in range(300)])
    assert abs(drawn.mean() - each.mean()) < 4 * each.std() / 300**0.5
    assert [policy.draw(s) for s in range(5)] == [policy.draw(s) for s in range(5)]


def test_a_draw_leaves_the_rest_of_the_weights_alone():
    x, y = batch()
    model = net()
    policy = SortedNet(model, x, widths=(0.5, 1.0), probabilities=[1, 0, 0, 0])
    policy.loss(x, y).backward()
    weight = model.head[-1].weight
    assert weight.grad[:, :24].any() and not weight.grad[:, 24:].any()
    assert all(p.grad is None for p in model.stages[1][3].parameters())


def test_all_of_it_is_the_model_and_budgets_need_no_search():
    x, _ = batch()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    policy = SortedNet(plain, x).eval()
    assert torch.equal(policy(x), plain(x)) and len(policy.configs) == 8
    prices = policy.prices(x).tolist()
    assert [int(policy.decide(x, budget=p + 1).choice[0]) for p in prices] == list(range(8))
    assert sum(p.numel() for p in policy.extract(0).parameters()) == 64 * 2 + 2 + 2 * 3 + 3
    check_family(policy, x)
    check_family(SortedNet(net().eval(), x, widths=(0.5, 1.0)).eval(), x)
    check_family(SortedNet(net("batch").eval(), x, widths=(0.5, 1.0)).eval(), x)


def test_random_truncation_of_a_linear_autoencoder_finds_the_principal_components_in_order():
    """The theorem behind the name: slices of width m span the top-m principal subspace, for every m."""
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = x - x.mean(0)
    basis = np.linalg.svd(x.numpy(), full_matrices=False)[2][:6]
    x = x / x.std()
    code = Width("code", 6)
    model = nn.Sequential(ElasticLinear(64, 6, False, outputs=code), ElasticLinear(6, 64, False, inputs=code))
    policy = SortedNet(model, x[:2], [Config((m,)) for m in range(1, 7)], loss="mse", accumulate=3)
    optimizer = torch.optim.Adam(policy.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    parts = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].split(300)
    for step in range(1500):
        part = parts[step % len(parts)] if step < 1200 else x
        optimizer.zero_grad()
        policy.loss(part, part, step).backward()
        optimizer.step()
        schedule.step()
    decoder = model[1].weight.detach().double().numpy()  # (64, 6)
    for m in range(1, 7):
        q, _ = np.linalg.qr(decoder[:, :m])
        cosines = np.linalg.svd(q.T @ basis[:m].T.astype(float), compute_uv=False)
        assert np.degrees(np.arccos(cosines.min().clip(-1, 1))) < 5, m


def test_sandwiches_teach_by_the_largest():
    x, y = batch()
    model = net()
    policy = Slimmable(ElasticFamily(model, grid(model, (0.5, 1.0), together=True), x))
    assert policy.draw(0)[0] == full(model) and policy.draw(0)[1] == policy.configs[0] and len(policy.draw(0)) == 4
    only = Slimmable(ElasticFamily(model, [full(model)], x), draws=0)
    torch.testing.assert_close(only.loss(x, y), nn.functional.cross_entropy(model(x), y) / 2)  # its divergence from itself is 0


def test_families_compile():
    x, _ = batch(7)
    policy = SortedNet(net().eval(), x, widths=(0.5, 1.0)).eval()
    policy.use(x, budget=float(policy.prices(x)[1]))
    program = split(policy, x)
    for n in (1, 2, 7):
        torch.testing.assert_close(program(x[:n]), policy(x[:n]))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_training_improves_small_and_large(norm):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (96,), generator=g)
    x = torch.randn(96, 1, 8, 8, generator=g) * 0.5
    for row, label in enumerate(y.tolist()):
        x[row, 0, 2 * label : 2 * label + 3] += 1
    policy = SortedNet(net(norm), x[:2], widths=(0.25, 1.0))
    fit_policy(policy, [(x, y)] * 20, epochs=2, optimizer=lambda p: torch.optim.Adam(p, 0.02))
    policy.eval()
    scores = policy.calibrate([(x, y)])
    assert scores.min() > 0.8
    alone = extract(policy.family.model, policy.configs[0])
    assert torch.equal(alone(x), policy.decide(x, config=0).output)


def test_what_is_refused():
    x, y = batch()
    with pytest.raises(BadInput, match="at least one draw"):
        SortedNet(net(), x, accumulate=0)
    with pytest.raises(BadInput, match="smallest feasible"):
        SortedNet(net(), x).decide(x, budget=1.0)
    with pytest.raises(BadInput, match="probability"):
        SortedNet(net(), x, probabilities=[1.0])
    with pytest.raises(BadInput, match="NaN"):
        SortedNet(net(), x).decide(x * float("nan"))
    with pytest.raises(BadInput):
        SortedNet(net(), x).loss(x, y + 5)
    with pytest.raises(UnsupportedModel, match="nothing in the model"):
        SortedNet(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), x)
