"""muP: the authors' numbers, two equivalent forms, nothing at the base width, and activations that move alike at every width."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.orthogonal import ROOT
from neurarium.learn.parametrize import (
    MuAdam,
    MuSGD,
    attention_scale,
    coordinate_check,
    infer_shapes,
    mup_,
    mup_groups,
)

F64 = {"dtype": torch.float64}


class Conv(nn.Module):
    def __init__(self, n, readout=nn.Linear):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, n, 3, **F64), nn.BatchNorm2d(n, **F64)
        self.conv2, self.fc = nn.Conv2d(n, 2 * n, 3, bias=False, **F64), nn.Linear(2 * n, n, **F64)
        self.head = readout(n, 10, **F64)

    def forward(self, x):
        x = self.conv2(F.relu(self.norm(self.conv1(x)))).mean((2, 3))
        return self.head(F.relu(self.fc(F.relu(x))))


class Former(nn.Module):
    """A transformer block whose heads grow, with tied embedding and readout if wished."""

    def __init__(self, n, tied=False, base=None):
        super().__init__()
        self.token, self.pos = nn.Embedding(11, n), nn.Parameter(0.1 * torch.randn(1, 6, n))
        self.norm, self.query, self.key, self.value = nn.LayerNorm(n), *(nn.Linear(n, n) for _ in range(3))
        self.up, self.down = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)
        self.head = nn.Linear(n, 11, bias=False)
        self.scale = attention_scale(n, base)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x):
        h = self.token(x) + self.pos
        z = self.norm(h)
        h = h + (self.query(z) @ self.key(z).mT * self.scale).softmax(-1) @ self.value(z)
        return self.head(h + self.down(F.gelu(self.up(self.norm(h))))).mean(1)


def mlp(n, bias=True):
    return nn.Sequential(nn.Linear(12, n, bias, **F64), nn.ReLU(), nn.Linear(n, n, bias, **F64), nn.ReLU(), nn.Linear(n, 5, bias, **F64))


def images(n=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 7, 7, generator=g, **F64), torch.arange(n) % 10


def vectors(n=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 12, generator=g, **F64), torch.arange(n) % 5


def train(model, optimizer, batch, steps=20):
    x, y = batch
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def seeded(make, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return make(*args, **kwargs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("family", ["adam", "sgd"])
@pytest.mark.parametrize(("make", "batch"), [(Conv, images), (mlp, vectors)])
def test_equals_the_authors_package(make, batch, family, weight_decay):
    peer = pytest.importorskip("mup")
    ours, theirs = seeded(make, 24), seeded(make, 24)
    if make is Conv:
        theirs.head, bases = peer.MuReadout(24, 10, **F64), [Conv(n, peer.MuReadout) for n in (8, 9)]
    else:
        theirs[-1] = peer.MuReadout(24, 5, **F64)
        bases = [nn.Sequential(*list(mlp(n))[:-1], peer.MuReadout(n, 5, **F64)) for n in (8, 9)]
    theirs.load_state_dict(ours.state_dict())
    peer.set_base_shapes(theirs, bases[0], delta=bases[1])
    shapes = infer_shapes(ours, make(8))
    mup_(ours, shapes, zero_readout=False)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14, msg=name)
    settings = {"lr": 1e-2, "weight_decay": weight_decay}
    train(ours, {"adam": MuAdam, "sgd": MuSGD}[family](ours, shapes, **settings), batch())
    train(theirs, {"adam": peer.MuAdam, "sgd": peer.MuSGD}[family](theirs.parameters(), **settings), batch())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        dead = name == "conv1.bias"  # in front of a normalisation: its gradient is rounding, which Adam makes large
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 if dead else 1e-10, msg=name)


def deterministic(n):
    model = mlp(n)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), **F64) * (i + 1)).view(p.shape) / p.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize(
    ("optimizer", "settings", "want"),
    [
        (
            "adam",
            {"lr": 1e-2, "weight_decay": 0.1},
            [
                4.234394565111311,
                0.09839199113184703,
                7.674845848202452,
                0.6400602446099192,
                3.2831831742570037,
                0.7843388287192603,
            ],
        ),
        (
            "sgd",
            {"lr": 0.1, "weight_decay": 0.1},
            [
                9.830993724096407,
                0.4075299002706803,
                9.840978765701408,
                1.202665170948332,
                6.185000222857397,
                0.8131279600463,
            ],
        ),
    ],
)
def test_equals_numbers_of_the_authors_package(optimizer, settings, want):
    """Sums of squares of the parameters after 10 steps, written down from the package (version 1.0.0)."""
    model = deterministic(24)
    shapes = infer_shapes(model, mlp(8))
    mup_(model, shapes, zero_readout=False)
    train(model, {"adam": MuAdam, "sgd": MuSGD}[optimizer](model, shapes, **settings), vectors(), steps=10)
    assert [float(p.detach().square().sum()) for p in model.parameters()] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_the_two_tables_are_one_function(alpha, zero, family):
    found = []
    for table in (8, 3):
        model = seeded(mlp, 32)
        shapes = infer_shapes(model, 4, readout_multiplier=alpha, table=table)
        mup_(model, shapes, zero_readout=zero)
        make = MuAdam if family == "adam" else MuSGD
        optimizer = make(model, shapes, lr=0.02, **({"eps": 1e-3} if family == "adam" else {"momentum": 0.9}))
        outputs = []
        for _ in range(8):
            train(model, optimizer, vectors(), 1)
            outputs.append(model(vectors()[0]).detach())
        found.append(torch.stack(outputs))
    assert (found[0][-1] - found[0][0]).abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("base", [None, 1, "module", "shapes"])
def test_at_the_base_width_nothing_changes(base):
    plain, model = seeded(Former, 8), seeded(Former, 8)
    base = {"module": model, "shapes": {n: tuple(p.shape) for n, p in model.named_parameters()}}.get(base, base)
    shapes = infer_shapes(model, base)
    assert "output" in {s.role for s in shapes.values()}
    mup_(model, shapes, zero_readout=False)
    batch = torch.arange(24).view(4, 6) % 11, torch.arange(4)
    train(plain, torch.optim.Adam(plain.parameters(), 1e-2), batch, 5)
    train(model, MuAdam(model, shapes, 1e-2), batch, 5)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    for family in ("sgd", "muon"):
        assert {g["lr"] for g in mup_groups(model, shapes, 0.5, family=family)} == {0.5}


def test_roles_of_a_transformer_and_of_a_convolutional_network():
    want = {
        "token": "embedding", "pos": "embedding", "norm": "vector", "query": "hidden", "key": "hidden", "value": "hidden", "up": "hidden",
        "down": "hidden", "head": "output",
    }  # fmt: skip
    for base in (Former(8), 3, {n: p.shape for n, p in Former(8).named_parameters()}):
        shapes = infer_shapes(Former(24), base)
        for name, s in shapes.items():
            assert s.role == ("vector" if name.endswith("bias") else want[name.split(".")[0]]), name
        assert (shapes["down.weight"].fan_in_mult, shapes["down.weight"].fan_out_mult, shapes["pos"].fan_out_mult) == (3, 3, 3)
        assert shapes.readouts == {"head": 3}
    for base in (Conv(8), 3.0):
        shapes = infer_shapes(Conv(24), base)
        assert [shapes[f"{n}.weight"].role for n in ("conv1", "conv2", "fc", "head")] == ["input", "hidden", "hidden", "output"]
        assert shapes["head.bias"].fan_out_mult == 1 and shapes["fc.bias"].fan_out_mult == 3
    with torch.device("meta"):
        base = Conv(8)
    assert infer_shapes(Conv(24), base) == infer_shapes(Conv(24), Conv(8))


def test_other_layers():
    def net(n):
        return nn.ModuleDict({
            "up": nn.ConvTranspose2d(n, 3, 2), "deep": nn.ConvTranspose2d(n, 2 * n, 2), "depthwise": nn.Conv1d(n, n, 3, groups=n),
            "rnn": nn.GRU(4, n), "attention": nn.MultiheadAttention(n, n // 4), "fixed": nn.Linear(3, 3),
        })  # fmt: skip

    shapes = infer_shapes(net(16), net(8))
    roles = {n: s.role for n, s in shapes.items() if "bias" not in n}
    assert roles == {
        "up.weight": "output", "deep.weight": "hidden", "depthwise.weight": "input", "rnn.weight_ih_l0": "input",
        "rnn.weight_hh_l0": "hidden", "attention.in_proj_weight": "hidden", "attention.out_proj.weight": "hidden", "fixed.weight": "fixed",
    }  # fmt: skip
    chains = [nn.Sequential(nn.Linear(4, a), nn.Linear(a, b), nn.Linear(b, 3)) for a, b in ((16, 96), (8, 24))]
    uneven = infer_shapes(*chains)
    assert (uneven["1.weight"].fan_in_mult, uneven["1.weight"].fan_out_mult) == (2, 4)
    model = net(64)
    before = float(model["rnn"].weight_ih_l0.detach().std()), model["rnn"].weight_hh_l0.detach().clone()
    mup_(model, infer_shapes(model, net(16)))
    assert float(model["rnn"].weight_ih_l0.detach().std()) == pytest.approx(2 * before[0])
    assert torch.equal(model["rnn"].weight_hh_l0, before[1])
    with pytest.raises(UnsupportedModel, match="heads grow"):
        infer_shapes(nn.TransformerEncoderLayer(32, 2), nn.TransformerEncoderLayer(16, 2))


def test_tied_weights_get_the_multiplier_and_keep_their_scale():
    model = seeded(Former, 24, tied=True, base=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_("bias" not in name)
    before = model.token.weight.detach().clone()
    x = torch.arange(12).view(2, 6) % 11
    shapes = infer_shapes(model, Former(8, tied=True))
    plain = model(x)
    mup_(model, shapes)
    assert torch.equal(model.token.weight, before) and shapes["token.weight"].role == "embedding" and shapes.readouts == {"head": 3}
    torch.testing.assert_close(model(x) * 3, plain)
    with pytest.raises(UnsupportedModel, match="table=8"):
        infer_shapes(model, Former(8, tied=True), table=3)


def test_twice_is_once_and_states_travel():
    model = seeded(Former, 16)
    shapes = infer_shapes(model, 2, readout_multiplier=3.0)
    mup_(model, shapes, zero_readout=False)
    once = copy.deepcopy(model.state_dict())
    mup_(model, shapes, zero_readout=False)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items()) and "mup_version" in once
    x = torch.arange(12).view(2, 6) % 11
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mup_(other, shapes)
        assert torch.equal(other(x), model(x))
    fresh = mup_(Former(16), shapes)
    fresh.load_state_dict(once)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(RuntimeError, match="mup_version"):
        Former(16).load_state_dict(once)  # a network without the multipliers would be another function
    with pytest.raises(BadInput, match="already"):
        mup_(model, infer_shapes(model, 4))


def test_no_attribute_on_tensors_and_it_exports_and_compiles():
    model = mup_(seeded(Conv, 16), infer_shapes(Conv(16), 2), zero_readout=False).eval()
    x = images(4)[0]
    assert all(not vars(p) for p in model.parameters())
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_initial_scales():
    def std(n, **kwargs):
        model = seeded(mlp, n)
        if kwargs.get("init") == "constant":
            for p in model.parameters():
                nn.init.normal_(p, 0, 0.02)
        shapes = infer_shapes(model, n / 16)
        mup_(model, shapes, zero_readout=False, **kwargs)
        return [float(p.detach().square().mean().sqrt()) for p in model.parameters()]

    for settings in ({}, {"init": "constant"}):
        narrow, wide = std(16, **settings), std(400, **settings)
        ratios = [b / a for a, b in zip(narrow, wide, strict=True)]
        assert ratios[:5] == pytest.approx([1, 1, 1 / 5, 1, 1], rel=0.3)


def test_zero_queries():
    model = mup_(Former(16), infer_shapes(Former(16), 2), zero_query=True)
    assert not model.query.weight.any() and model.key.weight.any() and not model.head.weight.any()
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2), nn.Linear(16, 3))
    mup_(layer, infer_shapes(layer, 2, overrides={"self_attn": "hidden"}), zero_query=True)
    assert not layer[0].self_attn.in_proj_weight[:16].any() and layer[0].self_attn.in_proj_weight[16:].all()
    with pytest.raises(UnsupportedModel, match="queries"):
        mup_(mlp(8), infer_shapes(mlp(8)), zero_query=True)


def test_groups_keep_settings_and_follow_the_table():
    model = Former(24)
    shapes = infer_shapes(model, Former(8))
    named = list(model.named_parameters())
    groups = mup_groups(
        [{"params": named[:5], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": named[5:]}], shapes, 0.3, weight_decay=0.1, eps=1e-6
    )
    assert sum(len(g["params"]) for g in groups) == len(named)
    for g in groups:
        base = 0.1 if "betas" in g else 0.3
        assert g["lr"] == pytest.approx(base / (3 if g["role"] == "hidden" else 1))
        assert g["lr"] * g["weight_decay"] == pytest.approx(base * 0.1)
        assert g["eps"] == pytest.approx(1e-6 / 3)
    rates = {g["role"]: g["lr"] for g in mup_groups(model, shapes, 1.0, family="sgd")}
    assert rates == pytest.approx({"embedding": 3, "vector": 3, "hidden": 1, "output": 3})
    assert {g["weight_decay"] for g in mup_groups(model, shapes, 1.0, weight_decay=0.1, scale_decay=False)} == {0.1}
    model.token.requires_grad_(False)
    assert not any(p is model.token.weight for g in mup_groups(model, shapes, 1.0) for p in g["params"])
    assert torch.optim.lr_scheduler.StepLR(MuAdam(model, shapes), 1).get_last_lr()[0] > 0


@pytest.mark.parametrize("scale", ["rms", "spectral", None])
def test_orthogonal_updates_have_the_spectral_norm_of_the_theory(scale):
    sizes = []
    for m in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8 * m), nn.Linear(8 * m, 16 * m), nn.Linear(16 * m, 4))
        shapes = infer_shapes(model, m)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        groups = mup_groups(model, shapes, 0.1, family="muon", orth_scale=scale)
        assert {g["role"] for g in groups if g["use_orth"]} == {"input", "hidden"}
        ROOT(groups, lr=0.1, scale=scale, weight_decay=0.0, coefficients="classic", ns_steps=30, quantile=None).step()
        moved = [(p - b).detach() for p, b in zip(model.parameters(), before, strict=True)]
        sizes.append([float(torch.linalg.matrix_norm(d, 2)) for d in moved if d.ndim == 2])
    (a, b, _), (c, d, _) = sizes
    assert c / a == pytest.approx(2, rel=0.02)  # the input's update grows like sqrt(m), the hidden one's not at all
    assert d / b == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("family", ["adam", "sgd", "muon"])
def test_coordinates_of_an_mlp_move_alike_at_all_widths(family):
    lr = {"adam": 2e-3, "sgd": 0.05, "muon": 0.02}[family]

    def make(n, parametrised=True):
        model = nn.Sequential(nn.Linear(12, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 5)).double()
        if not parametrised:
            return model, torch.optim.Adam(model.parameters(), lr)
        shapes = infer_shapes(model, n / 64)
        mup_(model, shapes)
        if family == "muon":
            return model, ROOT(mup_groups(model, shapes, lr, family="muon"), lr=lr, weight_decay=0.0)
        return model, {"adam": MuAdam, "sgd": MuSGD}[family](model, shapes, lr)

    found = coordinate_check(make, (64, 128, 256, 512), [vectors(64)], seeds=2)
    assert found.layers == ("0", "2", "4") and found.change.shape == (3, 4, 4)
    assert max(abs(s) for s in found.slope.values()) < 0.15, found.slope
    if family == "adam":
        assert coordinate_check(lambda n: make(n, False), (64, 128, 256, 512), [vectors(64)]).slope["2"] > 0.3


@pytest.mark.parametrize("tied", [False, True])
def test_coordinates_of_a_transformer(tied):
    def make(n):
        model = Former(n, tied, base=32)
        shapes = infer_shapes(model, Former(32, tied))
        mup_(model, shapes)
        return model, MuAdam(model, shapes, 2e-3)

    batch = torch.arange(48).view(8, 6) % 11, torch.arange(8)
    slope = coordinate_check(make, (32, 64, 128, 256), [batch]).slope
    assert max(abs(s) for s in slope.values()) < 0.3, slope


def test_refusals():
    model = mlp(8)
    with pytest.raises(BadInput, match="table"):
        infer_shapes(model, 2, table=5)
    with pytest.raises(BadInput, match="different parameters"):
        infer_shapes(model, mlp(4, bias=False))
    with pytest.raises(BadInput, match="positive"):
        infer_shapes(model, -1)
    with pytest.raises(BadInput, match="base must be"):
        infer_shapes(model, "x")
    with pytest.raises(BadInput, match="delta"):
        infer_shapes(model, 2, delta=mlp(4))
    with pytest.raises(BadInput, match="role"):
        infer_shapes(model, 2, overrides={"0": "boss"})
    with pytest.raises(BadInput, match="has shape"):
        infer_shapes(model, {n: (2,) for n, _ in model.named_parameters()})
    with pytest.raises(UnsupportedModel, match="no parameters"):
        infer_shapes(nn.ReLU())
    with pytest.raises(UnsupportedModel, match="not initialised"):
        infer_shapes(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(UnsupportedModel, match="pass a base"):
        infer_shapes(nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 4)), 2)
    with pytest.raises(UnsupportedModel, match="more than two"):
        infer_shapes(nn.Bilinear(4, 4, 4), nn.Bilinear(2, 2, 2))
    with pytest.raises(UnsupportedModel, match="itself"):
        mup_(nn.Linear(4, 3), infer_shapes(nn.Linear(4, 3), nn.Linear(2, 3)))
    shapes = infer_shapes(model, 2)
    with pytest.raises(BadInput, match="another model"):
        mup_(mlp(8, bias=False), shapes)
    with pytest.raises(BadInput, match="by name"):
        MuAdam(model.parameters(), shapes)
    with pytest.raises(BadInput, match="has no shape"):
        MuSGD([("x", model[0].weight)], shapes)
    with pytest.raises(BadInput, match="family"):
        mup_groups(model, shapes, 1.0, family="x")
    with pytest.raises(BadInput, match="init"):
        mup_(model, shapes, init="x")
    with pytest.raises(BadInput, match="no batch"):
        coordinate_check(lambda n: (model, MuAdam(model, shapes)), (2, 4), [])
    with pytest.raises(BadInput, match="two widths"):
        coordinate_check(lambda n: (model, None), (2,), [vectors()])
