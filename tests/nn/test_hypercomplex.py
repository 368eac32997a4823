"""Hypercomplex layers against Kronecker products, hand-computed algebras and the closed forms of their initialisation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from neurarium.errors import BadInput
from neurarium.nn.hypercomplex import (
    PadChannels,
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHLinear,
    QuaternionConv2d,
    algebra,
    decay_groups,
    dense,
    hypercomplex,
    kronecker_factors,
)
from neurarium.nn.replace import replace_layers
from neurarium.nn.signal import signal_report


def by_kron(layer):
    """H from torch.kron, one kernel position at a time."""
    a, f = layer.A, layer.F
    kernel = f.shape[3:]
    flat = f.flatten(3) if kernel else f[..., None]
    planes = [sum(torch.kron(a[i], flat[i, :, :, p].contiguous()) for i in range(len(a))) for p in range(flat.shape[3])]
    return torch.stack(planes, -1).reshape(planes[0].shape + kernel)


@pytest.mark.parametrize(
    "layer", [PHLinear(6, 9, 3), PHConv1d(8, 4, 5, 4), PHConv2d(6, 4, (3, 2), 2), PHConv3d(4, 8, 2, 4), QuaternionConv2d(8, 4, 3)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_weight_is_the_sum_of_kronecker_products(layer):
    torch.testing.assert_close(layer.weight, by_kron(layer))


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from([2, 3, 4]), stride=st.integers(1, 2), padding=st.sampled_from([0, 1, 2]), dilation=st.integers(1, 2),
       mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]), bias=st.booleans())  # fmt: skip
def test_convolution_is_the_dense_one_with_weight_h(n, stride, padding, dilation, mode, bias):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "bias": bias}
    ours, dense = PHConv2d(2 * n, n, 3, n, **options), nn.Conv2d(2 * n, n, 3, **options)
    dense.weight = nn.Parameter(by_kron(ours).detach())
    if bias:
        nn.init.normal_(ours.bias)  # the bias counts
        dense.bias = nn.Parameter(ours.bias.detach())
    x = torch.randn(2, 2 * n, 9, 7)
    torch.testing.assert_close(ours(x), dense(x))


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_n_1_is_the_ordinary_convolution_bit_for_bit(padding):
    ours, dense = PHConv2d(3, 5, 3, 1, padding=padding, algebra="real"), nn.Conv2d(3, 5, 3, padding=padding)
    dense.load_state_dict({"weight": ours.F[0], "bias": ours.bias})
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(ours(x), dense(x))


# Hamilton's table: (p, q) -> (sign, component) of the product of the units e_p e_q, e = 1, i, j, k.
HAMILTON = [
    [(1, 0), (1, 1), (1, 2), (1, 3)],
    [(1, 1), (-1, 0), (1, 3), (-1, 2)],
    [(1, 2), (-1, 3), (-1, 0), (1, 1)],
    [(1, 3), (1, 2), (-1, 1), (-1, 0)],
]


def test_quaternion_convolution_is_hamiltons_product():
    layer = QuaternionConv2d(4, 4, 1, bias=False)
    for p in range(4):
        for q in range(4):
            with torch.no_grad():
                layer.F.zero_()[p] = 1
            sign, component = HAMILTON[p][q]
            expected = torch.zeros(4)
            expected[component] = sign
            unit = torch.eye(4)[q].view(1, 4, 1, 1)
            assert torch.equal(layer(unit).flatten(), expected), (p, q)
    q, x = functional.normalize(torch.randn(4), dim=0), torch.randn(5, 4, 1, 1)
    with torch.no_grad():
        layer.F.copy_(q.view(4, 1, 1, 1, 1))
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1))  # a unit quaternion rotates


def test_complex_convolution():
    layer = PHConv2d(6, 4, 3, 2, algebra="complex", bias=False)
    x = torch.randn(2, 6, 6, 6)
    z, w = torch.complex(x[:, :3], x[:, 3:]), torch.complex(layer.F[0], layer.F[1])
    y = functional.conv2d(z, w)
    torch.testing.assert_close(layer(x), torch.cat([y.real, y.imag], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_parameter_count(n):
    s, d, k = 12, 24, 3
    assert sum(p.numel() for p in PHConv2d(d, s, k, n).parameters()) == n**3 + s * d * k**2 // n + s
    assert sum(p.numel() for p in PHLinear(d, s, n, bias=False).parameters()) == n**3 + s * d // n


RANDOM_RULE = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("n", "rule"), [(2, "learned"), (4, "learned"), (4, "quaternion"), pytest.param(3, RANDOM_RULE, id="3-random")])
def test_initial_variance_is_hes(n, rule):
    d, s, k = 24, 12, 3
    draws = [PHConv2d(d, s, k, n, algebra=rule).weight.detach() for _ in range(100)]
    assert torch.stack(draws).var().item() == pytest.approx(2 / (d * k**2), rel=0.05)


def test_authors_initialisation_has_their_variance():
    d, s, k, n = 64, 64, 3, 4
    draws = [PHConv2d(d, s, k, n, init="authors").weight.detach() for _ in range(100)]
    variance = torch.stack(draws).var().item()
    assert variance == pytest.approx(2 * n / (d * k**2 * (s + n**2)), rel=0.05)
    assert variance / (2 / (d * k**2)) == pytest.approx(0.05, rel=0.05)  # a twentieth of He's


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ten_layers_keep_the_signal(n):
    for seed in range(3):
        torch.manual_seed(seed)
        stack = nn.Sequential(*[m for _ in range(10) for m in (PHLinear(240, 240, n), nn.ReLU())])
        report = signal_report(stack, torch.randn(256, 240))
        assert 0.3 < report.gain < 3
        assert 0.3 < math.prod(s.backward_gain for s in report.layers) < 3


def test_weight_does_not_depend_on_the_basis_of_the_terms():
    layer = PHConv2d(8, 8, 3, 4)
    before, g = layer.weight.detach(), torch.randn(4, 4)
    with torch.no_grad():
        layer.A.copy_(torch.einsum("iab,ij->jab", layer.A, g))
        layer.F.copy_(torch.linalg.solve(g, layer.F.flatten(1)).view_as(layer.F))
    torch.testing.assert_close(layer.weight, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda n: PHConv2d(12, 24, 3, n), lambda n: PHLinear(24, 12, n), lambda n: PHConv1d(12, 12, 5, n)])
def test_fit_reproduces_a_weight_that_is_hypercomplex(make):
    for n in (1, 2, 3, 4):
        target, layer = make(n), make(n)
        nn.init.normal_(target.bias)
        assert layer.fit_(target) < 1e-5
        torch.testing.assert_close(layer.weight, target.weight, atol=1e-5, rtol=1e-4)
        assert torch.equal(layer.bias, target.bias)


def test_fit_is_the_best_rank_n_approximation_and_improves_with_terms():
    dense = nn.Conv2d(12, 12, 3)
    norm = dense.weight.norm()
    for n in (2, 3, 4):
        _, _, s = kronecker_factors(dense.weight, n)
        error = PHConv2d(12, 12, 3, n).fit_(dense)
        assert error == pytest.approx((s[n:].norm() / norm).item(), rel=1e-4)  # Eckart-Young
        errors = [(s[t:].norm() / norm).item() for t in range(1, n * n + 1)]
        assert errors == sorted(errors, reverse=True)
        a, f, _ = kronecker_factors(dense.weight, n, terms=n * n)  # all terms: exact
        whole = torch.einsum("iab,iceuv->acbeuv", a, f).reshape(dense.weight.shape)
        torch.testing.assert_close(whole, dense.weight.detach(), atol=1e-5, rtol=1e-4)


def test_a_quaternion_weight_has_rank_two_over_pairs():
    _, _, s = kronecker_factors(QuaternionConv2d(8, 8, 3).weight, 2)
    assert s[1] > 0.1
    assert s[2] < 1e-5


def test_fit_with_a_fixed_algebra_finds_the_filters():
    target, layer = QuaternionConv2d(8, 8, 3), QuaternionConv2d(8, 8, 3)
    layer.fit_(target)
    torch.testing.assert_close(layer.F, target.F)


def test_fit_of_fewer_blocks_than_terms():
    layer = PHLinear(4, 4, 4)  # every block is one number
    dense = nn.Linear(4, 4)
    assert layer.fit_(dense) < 1  # rank one in place of sixteen blocks
    assert torch.isfinite(layer.weight).all()


def test_learning_moves_the_weight_and_the_rule():
    layer = PHConv2d(4, 4, 3, 2)
    x = torch.randn(2, 4, 5, 5)
    before, out = layer.A.detach().clone(), layer(x)
    out.square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not torch.equal(layer(x), out)  # no stale weight
    assert not torch.equal(layer.A, before)
    assert set(layer.state_dict()) == {"A", "filters", "bias"}
    copy.deepcopy(layer)  # nothing non-leaf is stored
    assert not any(p is layer.A for p in PHConv2d(4, 4, 3, 2, algebra="complex").parameters())


def test_autocast_builds_the_weight_in_float32():
    layer = PHConv2d(8, 8, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert layer(torch.randn(1, 8, 5, 5)).dtype == torch.bfloat16


def test_sizes_that_n_does_not_divide_are_refused_with_the_nearest_that_works():
    with pytest.raises(BadInput, match=r"n = 4 must divide both 6 inputs and 9 outputs.*is 3"):
        PHLinear(6, 9, 4)
    with pytest.raises(BadInput, match=r"\(2, 2, 2\)"):
        PHConv2d(4, 4, 3, 2, algebra=torch.ones(3, 3, 3))
    with pytest.raises(BadInput, match="no fixed algebra"):
        algebra("octonion")


def small_net(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
                         nn.Conv2d(16, 16, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))  # fmt: skip


def test_rule_replaces_pads_and_leaves():
    x = torch.randn(2, 3, 12, 12)
    net = replace_layers(small_net(), hypercomplex(4), example=x)
    assert isinstance(net[0][1], PHConv2d)  # a zero channel in front of RGB
    assert net[0][1].in_channels == 4
    assert isinstance(net[2], PHConv2d)
    assert net[2].stride == (2, 2)
    assert isinstance(net[4], nn.Conv2d)
    assert isinstance(net[7], nn.Linear)
    report = net.replace_report
    assert [r.name for r in report.replaced] == ["0", "2"]
    assert {s.name: s.why.split()[0] for s in report.skipped} == {"4": "its", "7": "n"}
    assert report.after == 2 * 64 + (8 * 4 + 16 * 8) * 9 // 4 + 24
    net(x).sum().backward()
    assert isinstance(replace_layers(small_net(1), hypercomplex(4))[0], nn.Conv2d)  # one channel: stays real
    assert isinstance(replace_layers(small_net(1), hypercomplex(4, skip_first=False))[0][1], PHConv2d)
    assert isinstance(replace_layers(small_net(), hypercomplex(4, skip_first=True))[0], nn.Conv2d)
    assert isinstance(replace_layers(small_net(), hypercomplex(4, min_channels=16))[2], nn.Conv2d)


def test_rule_fit_compresses_a_trained_net_without_loss_where_it_can():
    torch.manual_seed(0)
    net = small_net()
    with torch.no_grad():
        net[2].weight.copy_(PHConv2d(8, 16, 3, 4).weight)
    x = torch.randn(2, 3, 12, 12)
    fitted = replace_layers(net, hypercomplex(4, init="fit"), keep=["0"], example=x)
    torch.testing.assert_close(fitted.eval()(x), net.eval()(x), atol=1e-5, rtol=1e-4)
    error = (replace_layers(net, hypercomplex(4, init="fit")).eval()(x) - net(x)).norm()
    fresh = (replace_layers(net, hypercomplex(4)).eval()(x) - net(x)).norm()
    assert error < fresh


def test_decay_spares_the_algebra():
    net = replace_layers(small_net(), hypercomplex(4))
    decayed, spared = decay_groups(net, 0.1)
    assert {id(p) for p in spared["params"]} == {id(m.A) for m in net.modules() if isinstance(m, PHConv2d)}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decay_groups(nn.Linear(2, 2), 0.1)) == 1


def test_exports_and_channels_last():
    layer, x = PHConv2d(4, 8, 3, 4, padding=1, padding_mode="reflect").eval(), torch.randn(2, 4, 6, 6)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), layer(x))


def test_zero_channels_go_in_front():
    x = torch.randn(2, 3, 4, 4)
    padded = PadChannels(3, 4)(x)
    assert (padded[:, 0] == 0).all()
    assert torch.equal(padded[:, 1:], x)
    assert [PadChannels(c, n).extra for c, n in ((3, 2), (3, 3), (2, 4), (1, 4))] == [1, 0, 2, 3]
    grey = PadChannels(1, 4)(x[:, :1])
    assert (grey[:, :3] == 0).all()
    assert torch.equal(grey[:, 3:], x[:, :1])


def test_the_rule_names_transposed_and_derived_layers():
    class Special(nn.Conv2d):
        pass

    class Head(nn.Linear):
        pass

    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3), Special(8, 8, 3), nn.Flatten(), Head(8, 4), nn.Linear(4, 4))
    net[5] = nn.utils.parametrizations.weight_norm(net[5])
    report = replace_layers(net, hypercomplex(4)).replace_report
    assert [r.name for r in report.replaced] == ["0"]
    assert [s.name for s in report.skipped] == ["1", "2", "4", "5"]
    for skipped, word in zip(report.skipped, ["transposed", "derives from Conv2d", "derives from Linear", "parametrised"], strict=True):
        assert word in skipped.why


def test_the_first_convolution_is_the_models_own():
    def lifted():  # a linear layer in front of the convolutions
        return nn.Sequential(nn.Linear(6, 4), nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3))

    for skip in (True, "auto", False):
        net = replace_layers(lifted(), hypercomplex(4, skip_first=skip))
        assert [s.name for s in net.replace_report.skipped] == (["0", "1"] if skip is True else ["0"])
        assert "n = 4" in net.replace_report.skipped[0].why  # six inputs: not because it comes first
    assert isinstance(replace_layers(nn.Sequential(nn.Linear(4, 4)), hypercomplex(4, skip_first=True))[0], PHLinear)
    kept = replace_layers(small_net(), hypercomplex(4, skip_first=True), keep=["0"])
    assert isinstance(kept[2], PHConv2d)  # the second does not become the first where the first is kept
    stack = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3))
    assert "must divide" in replace_layers(stack, hypercomplex(4), keep=["0"]).replace_report.skipped[0].why  # and is not padded


@pytest.mark.parametrize("rule", ["learned", "quaternion"])
def test_fit_refuses_another_shape_before_anything_changes(rule):
    layer = PHConv2d(8, 8, 3, 4, algebra=rule)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    others = [nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 5)]
    others += [nn.Linear(8, 8), nn.Conv1d(8, 8, 9), nn.ConvTranspose2d(8, 8, 3)]
    for other in others:
        with pytest.raises(BadInput, match=r"\(8, 8, 3, 3\)"):
            layer.fit_(other)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(PHLinear(8, 4, 4), (3, 8)), (PHLinear(6, 3, 3, bias=False), (2, 5, 6)), (PHConv1d(4, 8, 5, 2, stride=2, padding=1), (2, 4, 11)),
     (PHConv2d(8, 4, 3, 4, padding="same", dilation=2), (2, 8, 9, 7)),
     (PHConv2d(6, 6, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
     (PHConv3d(4, 4, 2, 2, stride=(1, 2, 1)), (1, 4, 5, 5, 5)), (QuaternionConv2d(4, 8, 3, bias=False), (2, 4, 6, 6))],
)  # fmt: skip
def test_dense_is_the_same_function_of_a_plain_layer(layer, shape):
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    plain, x = replace_layers(layer, dense()), torch.randn(shape)
    assert type(plain) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_takes_a_padded_stem_back_too(channels):
    x = torch.randn(2, channels, 12, 12)
    net = replace_layers(small_net(channels), hypercomplex(4, skip_first=False)).eval()
    nn.init.normal_(net[0][1].bias)
    plain = replace_layers(net, dense(), example=x)
    assert [type(m) for m in plain] == [type(m) for m in small_net()]  # no padding, no hypercomplex layer is left
    assert plain[0].weight.shape == (8, channels, 3, 3)
    torch.testing.assert_close(plain(x), net(x), atol=1e-5, rtol=1e-4)
