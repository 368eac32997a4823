"""Integer networks: bit for bit the numpy reference, no float inside, close to their origin; bit plans against brute force."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress import (
    BitPlan,
    bit_costs,
    count_float_ops,
    fold_batchnorm,
    knapsack_dp,
    plan_bits,
    prepare_qat,
    quantize_integer,
    sensitivities,
    simulate,
)
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes
from neurarium.testing.architectures import ARCHITECTURES, subject
from neurarium.testing.examples.compress.quantise import COVER

INTEGER = ("mlp", "vgg", "resnet", "mobilenet", "densenet", "unet")


def lived(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)  # negative factors, too
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return model.eval()


class Everything(nn.Module):
    """One of each operation that has an integer form."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.norm, self.leaky = nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.grouped, self.deep = nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.Conv2d(8, 16, (3, 1), padding=(1, 0), groups=8)
        self.wide, self.up = nn.Conv2d(24, 24, 1, groups=12), nn.ConvTranspose2d(24, 6, 3, 2, 1, 1, groups=3, bias=False)
        self.six, self.pool = nn.ReLU6(), nn.AvgPool2d(3, 1, 1)
        self.flat, self.drop = nn.Flatten(), nn.Dropout()
        self.hidden, self.between, self.head = nn.Linear(6 * 16, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)
        self.gate = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.norm(self.start(x)))
        y = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)[:, :, :4, :4]
        x = torch.cat([y - F.relu(self.grouped(x)), self.deep(y)], dim=1)
        x = self.six(self.up(torch.relu(self.wide(x))))
        x = F.interpolate(self.pool(x), scale_factor=2, mode="nearest") + self.shift
        x = F.avg_pool2d(x, 2)
        x = x * self.gate(x.mean((2, 3))).clamp(0, 6).view(x.size(0), 6, 1, 1) * 0.5
        a, b = nn.functional.adaptive_avg_pool2d(x, 4).chunk(2, dim=1)
        x = self.drop(self.flat(torch.cat((a, b), 1)))
        return self.head((self.between(self.hidden(x)) / 2 + 1.5).relu())


def everything() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return lived(Everything()), torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_operation_agrees_bit_for_bit_with_the_reference(bits: int) -> None:
    model, x = everything()
    net = quantize_integer(model, [x], bits=bits, act_bits=min(8, bits + 2))
    codes = net.encode(3 * x)  # beyond the calibration data
    got, want = net.core(*codes), simulate(net, *codes)
    assert got[0].dtype == torch.int32 and torch.equal(got[0].long(), want[0])
    assert count_float_ops(net.core, *codes) == 0
    if bits == 4:  # its weights are unpacked by integers, too
        assert count_float_ops(net.core, *codes, exported=True) == 0
    assert not any(b.is_floating_point() for b in net.core.buffers()) and not list(net.core.parameters())
    close = simulate(net, *codes, dyadic=False)
    assert int((close[0] - want[0]).abs().max()) <= 2
    if bits == 8:
        out, dense = net(x), model(x).detach()
        assert float((out - dense).square().mean()) < 0.01 * float(dense.var())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_becomes_integer_or_is_refused_by_name(name: str) -> None:
    if name in ("llama", "opt", "gpt2"):
        pytest.importorskip("transformers")
    it = subject(name)
    before = copy.deepcopy(it.model.state_dict())
    if name not in INTEGER:
        with pytest.raises(UnsupportedModel, match="no integer form"):
            COVER["hawqv3"](it)
    else:
        net = COVER["hawqv3"](it)
        codes = net.encode(*it.inputs)
        assert count_float_ops(net.core, *codes) == 0 < count_float_ops(it.model, *it.inputs)
        assert torch.equal(net.core(*codes)[0].long(), simulate(net, *codes)[0])
        assert float((it.run(net) - it.run()).square().mean()) < 0.01 * float(it.run().var())
    assert all(torch.equal(before[k], v) for k, v in it.model.state_dict().items())


def test_every_tensor_between_entry_and_exit_is_of_integers() -> None:
    it = subject("resnet")
    net = quantize_integer(it.model, it.loader)
    seen: list[torch.dtype] = []
    for step in net.core.steps:
        step.register_forward_hook(lambda m, args, out: seen.extend(t.dtype for t in (*args, out) if isinstance(t, Tensor)))
    net(*it.inputs)
    assert len(seen) > 30 and not any(d.is_floating_point for d in seen)


def test_norms_fold_without_changing_the_function() -> None:
    model, x = everything()
    folded = fold_batchnorm(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert isinstance(folded.norm, nn.Identity) and isinstance(folded.between, nn.Identity)
    for layer in (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3), nn.Linear(4, 6)):
        norm = nn.BatchNorm2d(6) if isinstance(layer, nn.ConvTranspose2d) else nn.BatchNorm1d(6)
        pair = lived(nn.Sequential(layer, norm))
        x = torch.randn(3, 4, *[5] * (layer.weight.ndim - 2))
        torch.testing.assert_close(fold_batchnorm(pair)(x), pair(x), rtol=1e-4, atol=1e-5)


def test_four_bit_weights_take_half_the_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = [torch.randn(16, 64)]
    sizes = {b: stored_bytes(quantize_integer(model, x, bits=b)) for b in (4, 8)}
    assert sizes[8] - sizes[4] == (64 * 128 * 2) // 2
    plan = BitPlan({"0": (4, 8), "2": (8, 4)})
    net = quantize_integer(model, x, bits=plan)
    assert net.plan.bits == plan.bits
    assert stored_bytes(net) - sizes[4] == 64 * 128 // 2


def test_a_scale_of_outliers_and_zero_channels() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0.0, 1e-9
        model[0].bias.copy_(torch.tensor([5.0, -3.0, 0.5]))
    x = torch.randn(20, 4)
    torch.testing.assert_close(quantize_integer(model, [x])(x), model(x), atol=0.05, rtol=0)


def test_training_with_the_quantiser_starts_from_it_and_reaches_the_integer_network() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 6), torch.arange(256) % 3
    x[torch.arange(256), y] += 2.0
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    for _ in range(3):
        model(x)
    net = prepare_qat(model.eval(), [x], bits=5)  # with fewer, the rounding of the biases to s_w s_x shows
    before = F.cross_entropy(net(x), y).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * float(before)
    integer = quantize_integer(net, [x], bits=5)
    assert float((integer(x) - net(x)).detach().abs().mean()) < 0.1 * float(net(x).detach().abs().mean())
    assert not any(m.training for m in net.modules())


def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    x = torch.randn(16, 1, 8, 8)
    lived(model)
    return model, [(x, model(x).argmax(1))]  # it knows its labels: the loss bends upwards


def test_the_plan_is_the_best_of_all_assignments() -> None:
    model, loader = task()
    choices = (2, 4, 8)
    harm = sensitivities(model, loader, choices=choices, probes=8)
    costs = bit_costs(model, loader[0][0], choices=choices)
    assert costs["bytes"]["3"] == [54.0, 108.0, 216.0] and costs["bops"]["0"][2] == 36 * 36 * 64
    names = list(harm)
    for kind in ("bytes", "bops"):
        budget = 0.4 * sum(costs[kind][n][2] for n in names)
        plan = plan_bits(model, loader, choices=choices, budget={kind: budget}, probes=8)
        fits = [c for c in product(range(3), repeat=3) if sum(costs[kind][n][i] for n, i in zip(names, c, strict=True)) <= budget]
        best = min(sum(harm[n][i] for n, i in zip(names, c, strict=True)) for c in fits)
        assert sum(plan.perturbation.values()) == pytest.approx(best) and plan.cost <= budget
        table = {n: [round(v) for v in costs[kind][n]] for n in names}
        dynamic = knapsack_dp(harm, table, int(budget))
        assert sum(harm[n][i] for n, i in dynamic.items()) == pytest.approx(best)
    tied = plan_bits(model, loader, budget={"bytes": 700.0}, ties=[("0", "3")], fixed={"6": 8}, probes=4)
    assert tied.bits["0"] == tied.bits["3"] and tied.bits["6"] == (8, 8)
    timed = plan_bits(model, loader, budget={"seconds": 5.0}, seconds=dict.fromkeys(names, (1.0, 2.0)), probes=4)
    assert timed.cost <= 5


def test_what_cannot_be_done_is_said() -> None:
    model, loader = task()
    for bad in ([], [torch.full((2, 1, 8, 8), float("nan"))], [torch.zeros(0, 1, 8, 8)]):
        with pytest.raises(BadInput, match="calibration loader"):
            quantize_integer(model, bad)
        if not len(bad) or bad[0].numel():
            with pytest.raises(BadInput, match="calibration loader"):
                prepare_qat(model, bad)
    for bits in (1, 9, BitPlan({"0": (32, 8)}), BitPlan({"nope": (4, 4)})):
        with pytest.raises(BadInput):
            quantize_integer(model, loader, bits=bits)
    with pytest.raises(UnsupportedModel, match=r"1.*Softmax"):
        quantize_integer(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)), [torch.randn(2, 8)])
    with pytest.raises(UnsupportedModel, match=r"1.*32 bits"):
        quantize_integer(nn.Sequential(nn.Identity(), nn.Linear(200_000, 1)), [torch.rand(2, 200_000)])
    with pytest.raises(UnsupportedModel, match="reflect"):
        quantize_integer(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), loader)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModel, match="traced"):
        quantize_integer(Branching(), [torch.randn(2, 4)])
    net = quantize_integer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)), loader)
    with pytest.raises(BadInput, match="averages"):
        net(torch.randn(1, 1, 9, 9))
    for options in ({"budget": {}}, {"budget": {"watts": 1}}, {"budget": {"seconds": 1}}, {"budget": {"bytes": 1}},
                    {"budget": {"bytes": 1e9}, "choices": (4, 4)}, {"budget": {"bytes": 1e9}, "fixed": {"0": 5}}):  # fmt: skip
        with pytest.raises(BadInput):
            plan_bits(model, loader, **options)
