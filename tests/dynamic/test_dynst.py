"""DynST: sensors that are switched off during training, and a field whose informative cells are known."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD

from neurarium import data
from neurarium.dynamic.sensors import DynST, SensorMask, _Sensors, apply_mask, density
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop
from neurarium.testing.examples.dynamic.sensors import _loader, _model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_no_sparsity_is_ordinary_training():
    plain, pruned = _model(0), _model(0)
    Backprop("mse").fit(plain, _loader(0), epochs=3)
    history = DynST(sparsity=0).fit(pruned, _loader(0), epochs=3)
    assert same(plain, pruned) and history.mask.all() and history.mask.shape == (4, 5)


@pytest.mark.parametrize("regrow", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("every", [1, 2])
def test_counts_follow_the_schedule(regrow, every):
    rounds, sparsity = 4, 0.6
    learner, epochs = DynST(sparsity=sparsity, rounds=rounds, prune_every=every, regrow=regrow), rounds * every + 2
    history = learner.fit(_model(0), _loader(0), epochs=epochs)
    want = [round(20 * density(epoch // every, rounds, sparsity)) for epoch in range(epochs)]
    assert list(history.extra["active"]) == want
    assert int(history.mask.sum()) == 8
    for r in range(rounds + 1):
        assert density(r, rounds, sparsity) == pytest.approx(0.4 + 0.6 * (1 - r / rounds) ** 3)


def test_some_come_back():
    """With growing back, a sensor that was off is on later; without, never."""
    for regrow, back in ((0.5, True), (0.0, False)):
        sensors = _Sensors(DynST(sparsity=0.6, rounds=4, regrow=regrow))
        g, masks = torch.Generator().manual_seed(0), []
        x = torch.randn(8, 2, 4, 5, generator=g)
        for epoch in range(4):
            sensors.read(x)
            sensors.learn(x, torch.randn(x.shape, generator=g))
            masks.append(sensors.mask.clone())
            sensors.end_epoch(epoch + 1)
        masks.append(sensors.mask)
        returned = [bool((later & ~earlier).any()) for earlier, later in pairwise(masks)]
        assert any(returned) == back


def test_the_least_useful_go_and_the_most_promising_come_back():
    """Of six sensors two are off; a round to two keeps the useful, drops the others, and takes back the one of largest slope."""
    sensors = _Sensors(DynST(sparsity=2 / 3, rounds=1, regrow=0.34, axis=-1))
    sensors.read(torch.zeros(1, 6))
    sensors.mask = torch.tensor([True, True, True, True, False, False])
    sensors.useful = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 0.0])
    sensors.promise = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, -2.0])
    sensors._round(1)
    assert sensors.mask.tolist() == [True, False, False, False, False, True]


def test_the_promise_of_a_sensor_that_is_off_is_the_slope_of_the_loss():
    """d loss / d m by finite differences, with the x that the sensor would have sent."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 2, 6).double()
    y = torch.randn(6, 3).double()
    sensors = _Sensors(DynST(axis=-1, fill=0.3, rate=0.0))
    sensors.read(x)
    sensors.mask[[1, 4]] = False
    seen = sensors.read(x).requires_grad_()
    (model(seen) - y).square().mean().backward()
    sensors.learn(x, seen.grad)

    def loss(sensor, m):
        moved = sensors.read(x).clone()
        moved[:, :, sensor] = m * x[:, :, sensor] + (1 - m) * 0.3
        return (model(moved) - y).square().mean().item()

    for sensor in range(6):
        m = float(sensors.mask[sensor])
        slope = (loss(sensor, m + 1e-5) - loss(sensor, m - 1e-5)) / 2e-5
        assert sensors.promise[sensor].item() / 6 == pytest.approx(slope, rel=1e-5)


def test_usefulness_of_a_linear_forecaster():
    """|w_i| std(x_i), up to a factor that all share, where the errors do not depend on x."""
    g = torch.Generator().manual_seed(0)
    std, weight = torch.rand(10, generator=g) + 0.2, torch.randn(10, generator=g)
    x = std * torch.randn(4000, 10, generator=g)
    error = torch.randn(4000, 1, generator=g)
    sensors = _Sensors(DynST(axis=-1))
    sensors.read(x)
    sensors.learn(x, 2 * error * weight / len(x))  # the gradient of the mean square error where the prediction is y + error
    want = weight.abs() * std
    ratio = sensors.useful / want
    assert ratio.std() < 0.05 * ratio.mean()
    assert torch.equal(sensors.useful.argsort(), want.argsort())


@pytest.mark.parametrize("axis", [(-2, -1), (2, 3)])
def test_a_sensor_that_is_off_says_nothing(axis):
    model = _model(0)
    history = DynST(sparsity=0.5, rounds=2, axis=axis).fit(model, _loader(0), epochs=3)
    deployed = apply_mask(model, history.mask, axis=axis)
    x = _loader(1)[0][0]
    noisy = torch.where(history.mask, x, torch.nan)
    assert torch.equal(deployed(x), deployed(noisy))
    assert torch.equal(deployed[0](x), torch.where(history.mask, x, 0.0))  # the same for all channels, that is, times
    changed = x.clone()
    changed[:, :, history.mask] += 1
    assert not torch.equal(deployed(x), deployed(changed))
    assert deployed[1] is not model


def test_a_resumed_run_ends_with_the_same_layout():
    learner = DynST(sparsity=0.5, rounds=3, regrow=0.4, optimizer=partial(SGD, lr=0.05, momentum=0.9))
    whole, parts = _model(0), _model(0)
    want = learner.fit(whole, _loader(0), epochs=5)
    half = learner.fit(parts, _loader(0), epochs=2)
    kept = copy.deepcopy(half.state)
    got = learner.fit(parts, _loader(0), epochs=5, resume=half.state)
    assert torch.equal(got.mask, want.mask) and got.extra["active"] == want.extra["active"] and same(whole, parts)
    assert torch.equal(half.state["parts"]["sensors"]["mask"], kept["parts"]["sensors"]["mask"])


def test_nodes_of_a_graph_in_double():
    """Sensors on an axis that is not the last: (n, times, nodes, features)."""
    torch.manual_seed(0)
    x = torch.randn(300, 3, 6, 2).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    y = x[:, -1, 2].repeat(1, 2) + 0.3 * torch.randn(300, 4).double()  # only node 2 is asked for
    learner = DynST(sparsity=0.8, rounds=3, axis=2, optimizer=partial(SGD, lr=0.1))
    history = learner.fit(model, [(x, y)] * 10, epochs=4, val=[(x, y)])
    assert history.mask.nonzero().flatten().tolist() == [2]
    assert history.val[-1]["loss"] < 0.3


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_other_scores(score):
    assert int(DynST(score=score, rounds=2).fit(_model(0), _loader(0), epochs=2).mask.sum()) == 10


def test_refusals():
    bad = {
        "sparsity": [1.0, -0.1], "regrow": [1.0], "rounds": [0], "prune_every": [0], "score": ["best"], "init": [0.0], "axis": [0, (2, 1)],
    }  # fmt: skip
    for name, values in bad.items():
        for value in values:
            with pytest.raises(BadInput):
                DynST(**{name: value})
    model = _model(0)
    before = copy.deepcopy(model)
    with pytest.raises(BadInput, match="leaves none"):
        DynST(sparsity=0.99).fit(model, _loader(0), epochs=1)
    with pytest.raises(BadInput, match="floating"):
        DynST().fit(model, [(torch.zeros(2, 2, 4, 5, dtype=torch.int64), torch.zeros(2, 1, 4, 5))], epochs=1)
    with pytest.raises(BadInput, match="no sensors"):
        DynST(axis=(5, 6)).fit(model, _loader(0), epochs=1)

    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.detach()[:, :1] + self.bias

    with pytest.raises(UnsupportedModel, match="Deaf"):
        DynST().fit(Deaf(), _loader(0), epochs=1)
    assert same(model, before)
    with pytest.raises(BadInput):
        SensorMask(torch.ones(4, 5))
    with pytest.raises(BadInput):
        apply_mask(model, torch.ones(4, 4, dtype=torch.bool))(_loader(0)[0][0])


def test_the_field_is_carried_by_the_wind():
    task = data.advected_field(60, 20, size=8, noise=0.0, seed=1)
    again = data.advected_field(60, 25, size=8, noise=0.0, seed=1)
    assert torch.equal(task.test.x, again.test.x[:20]) and torch.equal(task.wind, again.wind)
    divergence = task.wind[0].roll(-1, 0) - task.wind[0].roll(1, 0) + task.wind[1].roll(-1, 1) - task.wind[1].roll(1, 1)
    assert divergence.abs().max() < 0.7 * task.wind.abs().max()  # of waves on the grid, not of the curl itself
    # A unit in a cell spreads over the coming fields as the influence says, here by running the recursion from the data module.
    from neurarium.data.fields import _FADE, _carry

    step = _FADE * _carry(task.wind)
    assert torch.allclose(step.sum(1), torch.full((64,), _FADE))  # a constant field stays constant, but for the fading
    cell = torch.eye(64)[10]
    total = sum((torch.linalg.matrix_power(step, t) @ cell).square().sum() for t in range(1, 5)).sqrt()
    seen = torch.cat([task.train.x, task.train.y], 1).flatten(2)
    assert task.influence.flatten()[10].item() == pytest.approx((total * seen.std((0, 1))[10]).item(), rel=1e-4)
    # What the carrying does not explain is the sources' forcing.
    rest = seen[:, 1:] - seen[:, :-1] @ step.T
    away = torch.ones(64, dtype=torch.bool)
    for row, column in task.sources.tolist():
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                away[(row + dy) % 8 * 8 + (column + dx) % 8] = False
    assert rest.abs().max() > 0.1
    if away.any():
        assert rest[..., away].abs().max() < 0.1 * rest.abs().max()
    with pytest.raises(BadInput):
        data.advected_field(10, 10, size=2)
