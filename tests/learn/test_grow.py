"""Growth changes no function and forgets no momentum; the score is what the natural step promises; a grown run resumes bit for bit."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import EarlyStopping, load_checkpoint, save_checkpoint
from neurarium.learn.grow import (
    ExpandableCNN,
    SelfExpanding,
    carry,
    find_blocks,
    insert_identity_conv,
    natural_expansion_score,
    trainable,
    widen_conv,
)
from neurarium.learn.orthogonal import ROOT
from neurarium.learn.schedule import OneCycle

torch.manual_seed(0)
X = torch.randn(96, 1, 8, 8)
DATA = TensorData(X, (X[:, 0, 2, 2] > 0).long() + (X[:, 0, 5, 5] > 0).long())
BATCHES = DATA.batches(32)


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.gelu(self.norm(self.conv1(x)))))


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.PReLU(6), nn.Conv2d(6, 5, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def residual():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Residual(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def expandable():
    return ExpandableCNN((4, 3), classes=3, in_channels=1)


def trained(make, dtype=torch.float64):
    """With running statistics that are not those of a new model."""
    torch.manual_seed(1)
    model = make().to(dtype)
    for _ in range(5):
        model(torch.randn(16, 1, 8, 8, dtype=dtype) * 2 + 1)
    return model


@pytest.mark.parametrize("make", [plain, residual, expandable])
@pytest.mark.parametrize("training", [False, True])
def test_growth_preserves_the_function_exactly(make, training):
    model, x = trained(make).train(training), X.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    if training:  # statistics of the batch: a new channel must not disturb them either
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
    want = model(x)
    grown = model
    for _ in range(2):
        for block in find_blocks(grown, x):
            before = grown(x)
            grown = insert_identity_conv(grown, block.end, example=x, noise=0.0)
            assert torch.equal(grown(x), before)
        for block in find_blocks(grown, x):
            for conv in block.convs:
                try:
                    grown = widen_conv(grown, conv, 2, example=x, seed=3)
                except UnsupportedModel as error:
                    assert make is residual
                    assert "channels" in str(error)
                torch.testing.assert_close(grown(x), want, rtol=1e-13, atol=1e-13)  # sums of more terms, in another order
    assert len(trainable(grown)) > len(trainable(model))
    assert torch.equal(model(x), want)
    kernels = [m.weight for m in grown.modules() if isinstance(m, nn.Conv2d)]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(grown(x).square().sum(), kernels))
    assert all(p.dtype == torch.float64 for p in grown.parameters())


def test_every_new_weight_can_learn():
    model = trained(plain).eval()
    grown = widen_conv(model, "4", 2, example=X.double())
    optimizer = SGD(grown.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(grown(X.double()), DATA.y).backward()
        optimizer.step()
    assert (grown[4].weight.grad[-2:].abs().amax((1, 2, 3)) > 0).all()
    assert (grown[6].weight.grad[:, -2:].abs().amax((0, 2, 3)) > 0).all()


def test_what_cannot_be_widened_is_named():
    x = X.double()
    with pytest.raises(UnsupportedModel, match=r"add.*channels of 0"):
        widen_conv(trained(residual), "0", 2, example=x)
    assert widen_conv(trained(residual), "1.conv1", 2, example=x)[1].norm.num_features == 6
    last = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()).double()
    with pytest.raises(UnsupportedModel, match="output"):
        widen_conv(last, "0", 2, example=x)
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 3)).double()
    with pytest.raises(UnsupportedModel, match=r"^1: .*grouped"):
        widen_conv(grouped, "0", 1, example=x)
    with pytest.raises(UnsupportedModel, match=r"^1: .*mixes"):
        widen_conv(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)).double(), "0", 2, example=x)
    with pytest.raises(UnsupportedModel, match="nothing to grow"):
        SelfExpanding().fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), BATCHES, epochs=1)
    with pytest.raises(BadInput, match="no module"):
        insert_identity_conv(last, "7", example=x)


@pytest.mark.parametrize("make", [partial(Adam, lr=1e-2), partial(SGD, lr=0.05, momentum=0.9), partial(ROOT, lr=1e-2)])
def test_optimizer_state_is_carried(make):
    """After growth with dead new channels, training on is training on as before: the old weights go the same way."""
    model = trained(plain).eval()
    twin = deepcopy(model)
    one, two = make(model.parameters()), make(twin.parameters())

    def step(net, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(net(X.double()), DATA.y).backward()
        if net is twin and net[4].out_channels > 6:  # keep the new ones dead
            net[4].weight.grad[6:], net[6].weight.grad[:, 6:], net[5].weight.grad[6:] = 0, 0, 0
        optimizer.step()

    for _ in range(3):
        step(model, one)
        step(twin, two)
    from neurarium.learn.grow import _widen

    swaps = _widen(twin, "4", 2, X.double(), 0.0, 0)
    carry(two, trainable(twin), swaps)
    if make.func is ROOT:  # a matrix of another shape is orthogonalised otherwise: only what it remembers is comparable
        assert torch.equal(two.state[twin[4].weight]["momentum_buffer"][:6], one.state[model[4].weight]["momentum_buffer"])
        assert two.state[twin[4].weight]["momentum_buffer"][6:].abs().sum() == 0
        return
    for _ in range(3):
        step(model, one)
        step(twin, two)
    torch.testing.assert_close(twin[4].weight[:6], model[4].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twin[6].weight[:, :6], model[6].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twin[10].weight, model[10].weight, rtol=1e-9, atol=1e-12)


def test_the_full_score_is_twice_the_fall_of_a_gaussian_linear_model():
    """With unit noise, the Fisher matrix at the truth is the Hessian: eta/2 is what is lost by not being at the optimum."""
    torch.manual_seed(0)
    n, d = 6_000, 5
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    truth = torch.randn(d, dtype=torch.float64)
    y = x @ truth + torch.randn(n, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(truth + 0.02 * torch.randn(d))

    def nll(output, target):
        return 0.5 * (output[:, 0] - target).square().mean()

    score = natural_expansion_score(model, [(x, y)], loss=nll, fisher="full", damping=0.0)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    with torch.no_grad():
        fall = nll(model(x), y) - nll((x @ best)[:, None], y)
    assert score.eta == pytest.approx(2 * float(fall), rel=0.1)
    each = (model(x)[:, :1] - y[:, None]).detach() * x
    g = each.mean(0)
    closed = g @ torch.linalg.solve(each.mT @ each / n, g)
    assert score.eta == pytest.approx(float(closed), rel=1e-8)
    diagonal = natural_expansion_score(model, [(x[:900], y[:900]), (x[900:], y[900:])], loss=nll, damping=0.0)
    assert diagonal.eta == pytest.approx(float((g**2 / each.square().mean(0)).sum()), rel=1e-8)
    scaled = nn.Sequential(nn.Linear(d, 1, bias=False).double())  # the same function of a rescaled weight
    with torch.no_grad():
        scaled[0].weight.copy_(model.weight / 7)
    again = natural_expansion_score(scaled, [(7 * x, y)], loss=nll, damping=0.0)
    assert again.eta == pytest.approx(diagonal.eta, rel=1e-8)


def test_scores_are_bounded_and_never_fall_by_growth():
    model = trained(expandable)
    data = [(X[:48].double(), DATA.y[:48]), (X[48:].double(), DATA.y[48:])]
    for fisher in ("sample", "batch"):
        now = natural_expansion_score(model, data, fisher=fisher)
        assert 0 < now.eta <= now.parameters
        grown = insert_identity_conv(model, find_blocks(model, X.double())[0].end, example=X.double(), noise=0.0)
        wide = widen_conv(model, "blocks.0.0", 3, example=X.double())
        for other in (grown, wide):
            found = natural_expansion_score(other, data, fisher=fisher)
            assert found.eta >= now.eta * (1 - 1e-9)
            assert found.parameters > now.parameters
    with pytest.raises(BadInput, match="NaN"):
        natural_expansion_score(model, [(X.double() * torch.nan, DATA.y)])
    with pytest.raises(BadInput, match="no batch"):
        natural_expansion_score(model, [])
    with pytest.raises(BadInput, match="class"):
        natural_expansion_score(model, [(X.double(), DATA.y + 5)])


EAGER = SelfExpanding(tau=0.0, cooldown=1, samples=32, max_per_block=3)


@pytest.mark.parametrize(("fresh", "schedule"), [(True, None), (False, partial(OneCycle, max_lr=1e-2, total_steps=15, momentum=None))])
def test_a_grown_run_resumes_bit_for_bit(fresh, schedule, tmp_path):
    from dataclasses import replace

    learner = replace(EAGER, schedule=schedule)

    def start():
        torch.manual_seed(2)
        return expandable()

    whole, parts = start(), start()
    want = learner.fit(whole, BATCHES, epochs=4, val=BATCHES, seed=4)
    half = learner.fit(parts, BATCHES, epochs=3, val=BATCHES, seed=4)
    assert len(half.extra["expansions"]) == 2
    save_checkpoint(tmp_path / "half.safetensors", half.state)
    other = start() if fresh else parts
    state = torch.get_rng_state()
    got = learner.fit(other, BATCHES, epochs=4, val=BATCHES, seed=4, resume=load_checkpoint(tmp_path / "half.safetensors"))
    assert torch.equal(torch.get_rng_state(), state)
    assert got.extra == want.extra
    assert got.val == want.val
    a, b = whole.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    checkpoints = want.state["parts"]["growth"]["checkpoints"]
    assert [c["parameters"] for c in checkpoints] == list(dict.fromkeys(want.extra["parameters"]))[:-1]
    assert max(want.extra["parameters"]) == want.extra["parameters"][-1] == sum(p.numel() for p in whole.parameters())
    with pytest.raises(BadInput, match="sizes"):
        learner.fit(ExpandableCNN((5, 3), classes=3, in_channels=1), BATCHES, epochs=5, resume=half.state)
    with pytest.raises(BadInput, match="restore"):
        learner.fit(start(), BATCHES, epochs=1, callbacks=[EarlyStopping()])


def test_without_a_promise_nothing_grows():
    model = trained(residual, torch.float32)
    before = sum(p.numel() for p in model.parameters())
    history = SelfExpanding(tau=1e9, cooldown=1).fit(model, BATCHES, epochs=3)
    assert history.extra["expansions"] == ()
    assert len(history.extra["ratio"]) == 2
    assert sum(p.numel() for p in model.parameters()) == before
