"""Range estimation against fine grids, closed forms and torch's own observer; packed networks against their tables."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import BitPlan, RangeFit, RangePlan, apply_ranges, estimate_range, golden_section, plan_ranges, requant
from neurarium.compress.calibrate import Histogram
from neurarium.compress.quant.range import estimate_input_range
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes
from neurarium.testing.architectures import subject
from neurarium.testing.examples.compress.quantise import COVER


def laplace(n: int, seed: int = 0) -> Tensor:
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def error(w: Tensor, top: float, bits: int) -> float:
    return float((RangeFit(bits, (top,)).values(w) - w).square().sum())


def test_golden_section_finds_the_minima_of_many_functions_at_once() -> None:
    target = torch.linspace(0.1, 0.95, 7, dtype=torch.float64)
    for grid in (0, 16):
        found = golden_section(lambda x: (x - target).square() + 3, 0.02, 1.0, tol=1e-6, grid=grid, n=7)
        torch.testing.assert_close(found.x, target, atol=2e-6, rtol=0)
        assert found.evaluations <= 50
    wavy = golden_section(lambda x: torch.cos(20 * x) + x, 0.0, 1.0, tol=1e-6)  # three valleys, the first is the deepest
    assert float(wavy.x) == pytest.approx(0.1546, abs=1e-3)
    with pytest.raises(BadInput):
        golden_section(lambda x: x, 1.0, 0.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_range_is_as_good_as_a_grid_of_a_thousand(bits: int) -> None:
    for w in (laplace(4000), torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
        fit = estimate_range(w, bits)
        largest = float(w.abs().max())
        best = min(error(w, largest * a, bits) for a in torch.linspace(0.02, 1, 1000).tolist())
        assert fit.error <= 1.001 * best
        assert fit.error == pytest.approx(error(w, fit.top[0], bits))
        assert fit.evaluations <= 40


def test_closed_forms() -> None:
    """Uniform weights need their whole range; for a Gaussian the 15 best even levels end at 2.4 to 2.5 sigma; integers are exact."""
    uniform = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    q = 7
    assert 1 - 1 / q < estimate_range(uniform, 4).alpha[0] <= 1
    normal = torch.distributions.Normal(0, 1).icdf(torch.linspace(5e-6, 1 - 5e-6, 100_001, dtype=torch.float64))
    assert 2.35 < estimate_range(normal, 4).top[0] < 2.52
    whole = torch.randint(-7, 8, (40, 30), generator=torch.Generator().manual_seed(0)).double()
    assert estimate_range(whole, 4).error == pytest.approx(0, abs=1e-12)
    assert estimate_range(torch.zeros(3, 4), 4, per="channel").error == 0


def test_reshaping_never_loses_and_is_the_plain_search_at_power_one() -> None:
    w = laplace(3000).view(10, 300)
    plain = estimate_range(w, 4)
    assert estimate_range(w, 4, power=1.0) == plain
    bent = estimate_range(w, 4, power=None)
    assert bent.power < 1 and bent.error < 0.9 * plain.error
    assert bent.error == pytest.approx(float((bent.values(w) - w).square().sum()))
    for power in (0.4, 0.7):
        fit = estimate_range(w, 3, power=power, per="channel")
        torch.testing.assert_close(fit.values(fit.values(w)), fit.values(w))
        assert fit.values(w).unique(dim=1).shape[1] <= 300 and all(len(row.unique()) <= 7 for row in fit.values(w))
        torch.testing.assert_close(fit.values(-w), -fit.values(w))
    apart = estimate_range(w, 4, per="channel")
    assert apart.error <= plain.error and len(apart.top) == 10
    alone = [estimate_range(row, 4) for row in w]
    assert [a.top[0] for a in alone] == pytest.approx(apart.top, rel=1e-3)  # a channel's search stops with the slowest of them


def test_torchs_observer_is_never_better_on_weights() -> None:
    from torch.ao.quantization.observer import HistogramObserver

    for seed in range(3):
        w = laplace(2000, seed).float()
        peer = HistogramObserver(quant_min=-7, quant_max=7, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        peer(w)
        scale = float(peer.calculate_qparams()[0])
        assert estimate_range(w, 4).error <= 1.001 * error(w.double(), 7 * scale, 4)


def test_input_ranges_match_brute_force() -> None:
    x = laplace(4000).abs()
    counts = torch.bincount((x / 32 * 1024).long() + 1024, minlength=2048)
    low, high = estimate_input_range(Histogram(counts, 32.0), 4)
    assert low == 0
    scale = [h / 15 for h in torch.linspace(0.5, float(x.max()), 400).tolist()]
    best = min(float((torch.clamp((x / s).round(), 0, 15) * s - x).square().sum()) for s in scale)
    s = high / 15
    assert float((torch.clamp((x / s).round(), 0, 15) * s - x).square().sum()) <= 1.01 * best


def model() -> nn.Module:
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(288, 32), nn.Linear(32, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head)


def test_the_network_is_its_table_and_its_file_is_as_small_as_said() -> None:
    net, x = model().eval(), torch.rand(5, 3, 8, 8)
    small = requant(net, bits=3)
    for name, fit in small.plan.fits.items():
        want = fit.values(net.get_submodule(name).weight)
        torch.testing.assert_close(small.get_submodule(name).weight, want.float(), rtol=1e-5, atol=1e-7)
    weights = sum(net.get_submodule(n).weight.numel() for n in small.plan.fits)
    packed = sum(small.get_submodule(n).codes.numel() for n in small.plan.fits)
    assert packed == -(-8 * 27 * 3 // 8) + -(-32 * 288 * 3 // 8) + -(-128 * 3 // 8) == small.plan.bits.weight_bytes(net)
    assert stored_bytes(small) < stored_bytes(net) - 4 * weights + packed + 4 * (44 + 3 * 7) + 8
    for first, second in ((net, small), (small, requant(small, bits=3))):
        assert torch.isfinite(second(x) - first(x)).all()
    assert torch.equal(small(x), requant(small, bits=3)(x))
    errors = [float((requant(net, bits=b)(x) - net(x)).detach().abs().mean()) for b in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    assert buffer.tell() < 4 * weights


def test_plans_travel_as_text_and_follow_bit_plans() -> None:
    net = model().eval()
    plan = plan_ranges(net, bits=BitPlan({"0": (8, 4), "4": (2, 32)}), activations=[torch.rand(4, 3, 8, 8)])
    assert RangePlan.from_json(plan.to_json()) == plan
    assert [f.bits for f in plan.fits.values()] == [8, 2] and set(plan.inputs) == {"0"} and plan.inputs["0"][2] == 4
    assert plan.skipped == {"5": "the bit plan leaves it out"}
    first = requant(net, bits=4, activations=[torch.rand(4, 3, 8, 8)], edges=8, transform=None, per="tensor")
    assert [f.bits for f in first.plan.fits.values()] == [8, 4, 8] and all(f.power == 1 for f in first.plan.fits.values())
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(apply_ranges(net, RangePlan.from_json(first.plan.to_json()))(x), first(x))
    assert first.plan.inputs["4"][0] == 0 and torch.equal(copy.deepcopy(first)(x), first(x))
    assert len(first.plan.describe().splitlines()) == 4
    with pytest.raises(BadInput, match="9"):
        apply_ranges(net, RangePlan({"9": RangeFit(4, (1.0,))}))
    with pytest.raises(BadInput, match="output channels"):
        apply_ranges(net, RangePlan({"5": RangeFit(4, (1.0, 2.0))}))


def test_what_cannot_be_done_is_said_before_anything_changes() -> None:
    net = model()
    for loader in ([], [torch.full((2, 3, 8, 8), float("nan"))]):
        with pytest.raises(BadInput, match="calibration loader"):
            requant(net, activations=loader)
    for options in ({"bits": 1}, {"per": "row"}, {"transform": "log"}, {"bits": BitPlan({"nope": (4, 4)})}):
        with pytest.raises(BadInput):
            requant(net, **options)
    with torch.no_grad():
        net[4].weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match=r"4: .*finite"):
        requant(net)
    with pytest.raises(UnsupportedModel, match="no Linear or Conv2d"):
        requant(nn.Sequential(nn.BatchNorm1d(3)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert set(requant(tied).plan.skipped) == {"0", "2"}


@pytest.mark.parametrize("name", ["mobilenet", "vit", "gpt", "lstm"])
def test_any_architecture(name: str) -> None:
    it = subject(name)
    before = copy.deepcopy(it.model.state_dict())
    result = COVER["requant"](it)
    out, want = it.run(result), it.run()
    assert out.shape == want.shape and torch.isfinite(out).all()
    assert float((out - want).square().mean()) < 0.2 * float((want - want.mean()).square().mean())  # 6 bits stay close to the function
    assert all(torch.equal(before[k], v) for k, v in it.model.state_dict().items())
