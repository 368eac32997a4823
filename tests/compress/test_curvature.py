"""Probed traces agree with exact Hessians within their standard errors, which have the size that theory says; so do Taylor scores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F

from neurarium.compress import hessian_trace, hutchinson_trace, taylor
from neurarium.errors import BadInput


def _problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(40, 4).double(), torch.randint(0, 3, (40,))


def _exact(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """The Hessian of the mean loss in one parameter, as a matrix."""
    params = dict(model.named_parameters())
    loss = lambda w: F.cross_entropy(functional_call(model, {**params, name: w}, (x,)), y)  # noqa: E731
    size = params[name].numel()
    return hessian(loss, params[name].detach()).reshape(size, size)


def test_traces_agree_with_the_exact_hessian_within_their_errors() -> None:
    model, x, y = _problem()
    model.train()
    before = copy.deepcopy(model.state_dict())
    names = ["0.weight", "2.weight"]
    blocks = {"parameter": (24, 18), "channel": (6, 3), "layer": (1, 1)}
    for per, sizes in blocks.items():
        report = hessian_trace(model, [(x[:25], y[:25]), (x[25:], y[25:])], names=names, per=per, probes=100, chunk=25)
        outside = 0
        for name, size in zip(names, sizes, strict=True):
            diagonal = _exact(model, x, y, name).diagonal()
            exact = diagonal.reshape(size, -1).sum(1)
            z = (report.mean[name].flatten() - exact) / report.stderr[name].flatten()
            assert z.abs().max() < 4
            outside += int((z.abs() > 2).sum())
        assert outside <= 1 + 0.1 * sum(sizes)
        assert report.probes == 100
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_chunks_of_rows_add_up_and_one_seed_gives_one_report() -> None:
    model, x, y = _problem()
    settings = {"names": ["0.weight"], "per": "channel", "probes": 5}
    whole = hessian_trace(model, [(x, y)], **settings)
    parts = hessian_trace(model, [(x, y)], chunk=7, **settings)
    torch.testing.assert_close(whole.mean["0.weight"], parts.mean["0.weight"])
    assert not torch.equal(whole.mean["0.weight"], hessian_trace(model, [(x, y)], seed=1, **settings).mean["0.weight"])
    torch.testing.assert_close(
        hessian_trace(model, [(x, y)], names=["0.weight"], per=lambda _, t: t.sum(0), probes=5).mean["0.weight"].sum(),
        whole.mean["0.weight"].sum(),
    )


def test_standard_error_is_that_of_the_off_diagonal() -> None:
    half = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    matrix = half @ half.T
    w = torch.randn(8, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    report = hutchinson_trace(
        lambda: w @ matrix @ w / 2, {"w": w}, probes=1500, per="parameter", generator=torch.Generator().manual_seed(0)
    )
    off = matrix - torch.diag(matrix.diagonal())
    torch.testing.assert_close(report.stderr["w"] * 1500**0.5, off.square().sum(1).sqrt(), rtol=0.1, atol=0)
    layer = hutchinson_trace(lambda: w @ matrix @ w / 2, {"w": w}, probes=1500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.stderr["w"] * 1500**0.5, (2 * off.square().sum()).sqrt(), rtol=0.1, atol=0)


def test_a_diagonal_hessian_is_exact_with_one_probe_and_stops_early() -> None:
    a = torch.tensor([1.0, -2.0, 5.0])
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    params = {"w": w, "unused": unused}
    one = hutchinson_trace(lambda: (a * w.square()).sum() / 2, params, probes=1, per="parameter")
    assert one.mean["w"].tolist() == a.tolist()
    assert one.mean["unused"].tolist() == [0, 0]
    assert torch.isinf(one.stderr["w"]).all()
    many = hutchinson_trace(lambda: (a * w.square()).sum() / 2, params, probes=100, tol=0.01)
    assert many.probes == 8
    assert many.relative_error == 0
    assert hutchinson_trace(lambda: (a * w).sum(), {"w": w}, probes=2).mean["w"] == 0  # a linear loss does not bend
    model, x, y = _problem()
    early = hessian_trace(model, [(x, y)], names=["0.weight", "2.weight"], probes=4000, tol=0.1)
    assert early.probes < 4000
    assert early.relative_error <= 0.1
    assert early.probes % 8 == 0


def test_layers_without_fused_second_derivatives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 8))
    head = nn.Sequential(model, nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.randn(6, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    report = hessian_trace(head, [(x, y)], names=["0.0.weight", "0.4.linear1.weight", "0.4.self_attn.in_proj_weight"], probes=2)
    assert all(torch.isfinite(m).all() for m in report.mean.values())


class _Quadratic(nn.Module):
    """Output c - w: its squared error has the Hessian 2 I and no mixed terms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.weight.flatten()


def test_second_order_taylor_is_the_loss_change_of_a_diagonal_quadratic() -> None:
    model, x, y = _Quadratic(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(9)
    loss_fn = lambda out, _: out.square().sum(-1).mean()  # noqa: E731
    h = hessian_trace(model, [(x, y)], names=["weight"], per="parameter", probes=1, loss_fn=loss_fn).mean
    torch.testing.assert_close(h["weight"], torch.full((2, 2), 2.0, dtype=torch.float64))
    scores = taylor(model, [(x, y)], names=["weight"], per="channel", reduce="signed", curvature=h, loss_fn=loss_fn)["weight"]
    for channel in range(2):
        cut = copy.deepcopy(model)
        cut.weight.data[channel] = 0
        change = loss_fn(cut(x), y) - loss_fn(model(x), y)
        torch.testing.assert_close(scores[channel].float(), change.detach(), rtol=1e-5, atol=1e-5)


def test_taylor_reductions_by_their_definitions() -> None:
    model, x, y = _problem()
    model = model.float()
    x = x.float()
    name = "2.weight"
    weight = dict(model.named_parameters())[name]
    rows = torch.stack([torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), weight)[0] for a, b in zip(x, y, strict=True)])
    each = -(rows * weight).sum(2).detach().double()  # (samples, channels)
    for reduce, expected in {
        "signed": each.mean(0),
        "batch": each.mean(0).abs(),
        "sample": each.abs().mean(0),
        "square": each.square().mean(0),
    }.items():
        torch.testing.assert_close(taylor(model, [(x, y)], names=[name], reduce=reduce)[name], expected, rtol=1e-4, atol=1e-7)
    small = copy.deepcopy(model)
    small[2].weight.data[1] *= 1e-3  # close to zero, the first order is the whole change
    cut = copy.deepcopy(small)
    cut[2].weight.data[1] = 0
    change = F.cross_entropy(cut.double()(x.double()), y) - F.cross_entropy(copy.deepcopy(small).double()(x.double()), y)
    signed = taylor(small, [(x, y)], names=[name], reduce="signed")[name][1]
    torch.testing.assert_close(signed, change.detach(), rtol=0.02, atol=0)


def test_bad_input_is_named() -> None:
    model, x, y = _problem()
    with pytest.raises(BadInput, match="no parameter '9'"):
        hessian_trace(model, [(x, y)], names=["9"])
    with pytest.raises(BadInput, match="per must be"):
        hessian_trace(model, [(x, y)], names=["0.weight"], per="row")
    with pytest.raises(BadInput, match="finite"):
        hessian_trace(model, [(x, y)], names=["0.weight"], loss_fn=lambda out, _: out.sum() * float("nan"))
    with pytest.raises(BadInput, match="empty"):
        taylor(model, [], names=["0.weight"])
    with pytest.raises(BadInput, match="mean loss"):
        taylor(model, [(x, y)], names=["0.weight"], reduce="sample", curvature={})
