"""Local rules: each block learns alone, the sum of what they learn is what the papers say, and backpropagation is the limit."""

import pickle
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.cascaded_forward import CascadedForward, ridge_regression, sparsemax, sparsemax_loss
from neurarium.learn.chain import as_chain
from neurarium.learn.fit import Backprop, Diverged, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.local import Facts, goodness, gradient_alignment, overlay_label
from neurarium.learn.mono_forward import MonoForward
from neurarium.testing.locality import assert_local

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
DATA = TensorData(X.float() / 16, Y)
TRAIN, VAL = DATA.split(1200, seed=0)
VALID = VAL.batches(300, shuffle=False)
BATCH = TRAIN[:96]


def mlp(*widths, seed=0, head=True):
    torch.manual_seed(seed)
    layers = [m for a, b in zip((64, *widths), widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, *([nn.Linear(widths[-1], 10)] if head else []))


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Residual(8), nn.MaxPool2d(2), Residual(8),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def transformer(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), Pool(), nn.Linear(16, 10)
    )  # fmt: skip


RULES = [
    MonoForward(), MonoForward(order="parallel"), MonoForward(input_readout=False), ForwardForward(), ForwardForward(order="greedy"),
    CascadedForward(), CascadedForward(loss="ce"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES[:5], ids=str)
@pytest.mark.parametrize("make", [partial(mlp, 32, 24, 16), cnn, transformer])
def test_every_rule_is_local(rule, make):
    assert_local(rule, make(), BATCH)


def test_the_test_of_locality_catches_what_is_not_local():
    with pytest.raises(AssertionError, match="depends on the weights"):
        assert_local(MonoForward(order="parallel", detach=False), mlp(16, 16, 16), BATCH)


@pytest.mark.parametrize("optimizer", [partial(Adam, lr=3e-3), partial(SGD, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("order", ["parallel", "greedy"])
def test_mono_forward_with_one_hidden_layer_is_backpropagation(optimizer, order):
    ours, theirs = mlp(32), mlp(32)
    rule = MonoForward(optimizer=optimizer, order=order, input_readout=False, cache=False)
    rule.fit(ours, TRAIN.batches(64), epochs=2)
    Backprop(optimizer=optimizer).fit(theirs, TRAIN.batches(64), epochs=2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_mono_forward_gives_each_layer_the_gradient_of_its_own_readout_alone():
    model = mlp(32, 16)
    rule = MonoForward(optimizer=partial(SGD, lr=1.0), order="parallel", input_readout=False)
    trained = deepcopy(model)
    rule.fit(trained, [BATCH], epochs=1)
    torch.manual_seed(0)  # the readouts are the first thing that fit draws
    readout = nn.Linear(32, 10, bias=False)
    x, y = BATCH
    first = model[1](model[0](x))
    F.cross_entropy(readout(first), y).backward()
    second = model[4](model[3](model[2](first.detach())))
    F.cross_entropy(second, y).backward()
    for before, after in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(after, before - before.grad)


@pytest.mark.parametrize("order", ["parallel", "greedy"])
def test_mono_forward_learns_and_the_model_is_its_own_predictor(order):
    model = mlp(64, 64)
    rule = MonoForward(order=order)
    history = rule.fit(model, TRAIN.batches(32), epochs=8, val=VALID)
    assert rule.predictor(model) is model
    assert evaluate(model, VALID)["accuracy"] > 0.9
    assert history.val[-1]["loss"] == pytest.approx(evaluate(model, VALID)["loss"], rel=1e-5)
    assert [e.get("block") for e in history.train[::8]] == ([0, 1, 2] if order == "greedy" else [None])


def test_summed_prediction_is_the_sum_of_all_readouts_and_an_ordinary_module():
    model = mlp(16, 16)
    rule = MonoForward(predict="sum")
    rule.fit(model, TRAIN.batches(64), epochs=1)
    objective, x = rule.trained(model), VAL.x[:5]
    a1 = model[1](model[0](x))
    want = objective.own[0](x) + objective.own[1](a1) + model(x)
    predictor = rule.predictor(model)
    torch.testing.assert_close(predictor(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(predictor))(x), want)
    torch.testing.assert_close(torch.export.export(predictor, (x,)).module()(x), want)
    with pytest.raises(BadInput, match="not trained by a ForwardForward"):
        ForwardForward().predictor(model)


def test_greedy_trains_on_cached_outputs_of_finished_blocks():
    """With the order of batches fixed, caching and recomputing are one and the same."""
    whole = [(TRAIN.x[:256], TRAIN.y[:256])]
    cached, recomputed = mlp(32, 16), mlp(32, 16)
    MonoForward().fit(cached, whole, epochs=3)
    MonoForward(cache=False).fit(recomputed, whole, epochs=3)
    for a, b in zip(cached.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_greedy_stops_each_block_by_its_own_validation_loss():
    model = mlp(16, 16)
    history = MonoForward(optimizer=partial(Adam, lr=0.05), early_stopping=1).fit(model, TRAIN.batches(64), epochs=30, val=VALID)
    for block in range(3):
        losses = [e["loss"] for e in history.val if e["block"] == block]
        assert 1 < len(losses) < 30
        assert losses[-1] >= min(losses[:-1])
        assert all(b < min(losses[: i + 1]) for i, b in enumerate(losses[1:-1]))


@pytest.mark.parametrize(
    "rule", [MonoForward(early_stopping=2), MonoForward(cache=False), ForwardForward(order="greedy"), CascadedForward(loss="ce")], ids=str
)
@pytest.mark.parametrize("stop", [0, 3])
def test_a_greedy_run_resumes_bit_for_bit_inside_any_block(rule, stop, tmp_path):
    def loader():
        return DataLoader(TRAIN, batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(4))

    class Interrupt(Exception):
        pass

    seen = []

    def interrupt(progress):
        seen.append(progress.epoch)
        if len(seen) == stop + 1:
            save_checkpoint(tmp_path / "half", progress.state())
            raise Interrupt

    whole, broken = mlp(16, 12), mlp(16, 12)
    want = rule.fit(whole, loader(), epochs=2, val=VALID)
    with pytest.raises(Interrupt):
        rule.fit(broken, loader(), epochs=2, val=VALID, callbacks=[interrupt])
    fresh = mlp(16, 12, seed=8)
    state = load_checkpoint(tmp_path / "half")
    got = rule.fit(fresh, loader(), epochs=2, val=VALID, resume=state)
    for a, b in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert got.extra["loss"] == want.extra["loss"]
    assert got.val == want.val
    with pytest.raises(BadInput, match="greedy"):
        rule.fit(fresh, loader(), epochs=3, resume=state)


def test_overlay_replaces_the_first_values_by_a_label_as_bright_as_the_data():
    x = torch.rand(4, 1, 5, 5)
    got = overlay_label(x, torch.tensor([0, 2, 1, 2]), 3, 7.0)
    assert got.shape == x.shape
    assert got.flatten(1)[:, :3].tolist() == [[7, 0, 0], [0, 0, 7], [0, 7, 0], [0, 0, 7]]
    assert torch.equal(got.flatten(1)[:, 3:], x.flatten(1)[:, 3:])
    with pytest.raises(BadInput, match="does not fit"):
        overlay_label(torch.rand(2, 3), torch.tensor([0, 1]), 5, 1.0)


def forward_forward(model, **settings):
    rule = ForwardForward(**settings)
    return rule.objective(as_chain(model, BATCH[0]), Facts(BATCH[0], 10, float(DATA.x.max())))


@pytest.mark.parametrize("kind", ["mean_square", "sum_square"])
def test_goodness_has_the_gradient_of_the_closed_form(kind):
    model = mlp(12, 8)
    objective = forward_forward(model, goodness=kind, theta=1.5)
    h = torch.rand(10, 12, dtype=torch.float64, requires_grad=True)
    objective.loss(0, h, h, Y[:5])[0].backward()
    d, theta = (12, 1.5) if kind == "mean_square" else (1, 18.0)
    g = h.detach().square().sum(1, keepdim=True) / d
    sign = torch.cat([-torch.sigmoid(theta - g[:5]), torch.sigmoid(g[5:] - theta)])
    torch.testing.assert_close(h.grad, sign * 2 * h.detach() / d / 5)
    assert torch.equal(goodness(h, kind), h.square().sum(1) / d)


def test_negatives_never_carry_the_true_label():
    for negatives in ("random", "hard"):
        objective = forward_forward(mlp(12, 8), negatives=negatives)
        positive, negative = objective.enter(*BATCH).chunk(2)
        assert torch.equal(positive[:, :10].argmax(1), BATCH[1])
        assert (negative[:, :10].argmax(1) != BATCH[1]).all()
        assert len(negative[:, :10].argmax(1).unique()) == 10


def test_length_says_nothing_to_the_next_layer():
    objective = forward_forward(mlp(12, 8))
    h = torch.rand(6, 12)
    torch.testing.assert_close(objective.between(h), objective.between(h * torch.rand(6, 1).add(1e-2)))
    torch.testing.assert_close(objective.between(h).square().mean(1), torch.ones(6))
    l2 = forward_forward(mlp(12, 8), normalise="l2")
    torch.testing.assert_close(l2.between(h).square().sum(1), torch.ones(6))


def test_labels_in_one_batch_are_labels_one_by_one():
    model = mlp(12, 8, 8)
    together = forward_forward(model).predictor(model)
    apart = forward_forward(model, per_label_batch=False).predictor(model)
    torch.testing.assert_close(together(VAL.x[:7]), apart(VAL.x[:7]))
    # by hand: goodness of layers 1 and 2, not of layer 0
    x = overlay_label(VAL.x[:7], torch.full((7,), 3), 10, float(DATA.x.max()))
    total = 0
    for i, layer in enumerate((model[:2], model[2:4], model[4:6])):
        x = layer(x / x.square().mean(1, keepdim=True).sqrt())
        total = total + (x.square().mean(1) if i else 0)
    torch.testing.assert_close(together(VAL.x[:7])[:, 3], total)


def test_forward_forward_learns():
    model = mlp(96, 96)
    rule = ForwardForward()
    rule.fit(model, TRAIN.batches(32), epochs=20)
    assert evaluate(rule.predictor(model), VALID)["accuracy"] > 0.85


def test_cascade_in_closed_form_is_scikit_learns_ridge_on_the_features():
    model = mlp(200, 1300)
    start = deepcopy(model)
    rule = CascadedForward(ridge=0.5)
    rule.fit(model, TRAIN.batches(100), epochs=1)
    h, targets = TRAIN.x, F.one_hot(TRAIN.y, 10).double().numpy()
    for layer, readout in ((start[:2], rule.trained(model).own[0].linear), (start[2:4], model[4])):
        h = layer(h)
        want = Ridge(alpha=0.5, fit_intercept=False).fit(h.detach().double().numpy(), targets).coef_
        np.testing.assert_allclose(readout.weight.detach().numpy(), want, atol=2e-4)
    for (name, a), b in zip(start.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) == (not name.startswith("4")), "random blocks do not move, the head does"
    assert evaluate(rule.predictor(model), VALID)["accuracy"] > 0.93


def test_ridge_is_one_answer_on_either_side():
    f, t = torch.rand(20, 30, dtype=torch.float64), torch.rand(20, 3, dtype=torch.float64)
    direct = torch.linalg.solve(f.T @ f + 0.1 * torch.eye(30), f.T @ t)
    torch.testing.assert_close(ridge_regression(f, t, 0.1), direct)
    f = f.T
    t = torch.rand(30, 3, dtype=torch.float64)
    torch.testing.assert_close(ridge_regression(f, t, 0.1), torch.linalg.solve(f.T @ f + 0.1 * torch.eye(20), f.T @ t))
    with pytest.raises(BadInput, match="ridge"):
        ridge_regression(f, t, 0)


def test_cascade_votes_with_probabilities_and_batch_norms_know_their_data():
    model = cnn()
    rule = CascadedForward(loss="sparsemax")
    rule.fit(model, TRAIN.batches(200), epochs=2)
    model.eval()
    predictor = rule.predictor(model)
    outputs = rule.trained(model).chain.forward(VAL.x[:9])
    readouts = [*rule.trained(model).own, model[-1]]
    want = torch.stack([r(h).softmax(1) for r, h in zip(readouts, outputs)]).mean(0).log()
    torch.testing.assert_close(predictor(VAL.x[:9]), want)
    norm = model[3].norm
    assert not torch.allclose(norm.running_var, torch.ones(8), atol=0.1)
    fed = model[3].conv(model[:3](TRAIN.x))
    torch.testing.assert_close(norm.running_mean, fed.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_direct_feedback_trains_the_blocks_of_a_cascade():
    random, taught = mlp(48, 48), mlp(48, 48)
    CascadedForward().fit(random, TRAIN.batches(32), epochs=6)
    CascadedForward(blocks="dfa").fit(taught, TRAIN.batches(32), epochs=6)
    assert evaluate(taught, VALID)["accuracy"] > evaluate(random, VALID)["accuracy"] + 0.02
    with pytest.raises(UnsupportedModel, match="head"):
        CascadedForward(blocks="dfa").fit(mlp(8, head=False), TRAIN.batches(32), epochs=1)


def test_sparsemax_is_the_projection_onto_the_simplex_and_its_loss_has_that_gradient():
    scores = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = sparsemax(scores)
    for row, got in zip(scores, p, strict=True):
        z = row.numpy()
        simplex = {"type": "eq", "fun": lambda q: q.sum() - 1}
        found = minimize(lambda q, z=z: ((q - z) ** 2).sum(), np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=[simplex], tol=1e-12)
        np.testing.assert_allclose(got.numpy(), found.x, atol=1e-6)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    z = scores.clone().requires_grad_()
    sparsemax_loss(z, y).backward()
    torch.testing.assert_close(z.grad * 6, p - F.one_hot(y, 4))
    assert torch.autograd.gradcheck(lambda s: sparsemax_loss(s, y), scores.clone().requires_grad_())
    sure = torch.tensor([[3.0, 1.9, 0.0]])
    assert float(sparsemax_loss(sure, torch.tensor([0]))) == pytest.approx(0, abs=1e-6)


def test_alignment_is_one_for_backpropagation_and_for_the_layer_that_sees_the_true_loss():
    model = mlp(32, 16)
    assert all(v == pytest.approx(1, abs=1e-5) for v in gradient_alignment(Backprop(), model, BATCH).values())
    found = gradient_alignment(MonoForward(), model, BATCH)
    assert found["4.weight"] == pytest.approx(1, abs=1e-5)
    assert found["2.weight"] == pytest.approx(1, abs=1e-5)
    assert abs(found["0.weight"]) < 0.9
    assert np.isnan(gradient_alignment(CascadedForward(loss="ce"), model, BATCH)["0.weight"])


def test_diverging_blocks_are_named_in_both_orders():
    model = mlp(16, 16)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    for order in ("parallel", "greedy"):
        with pytest.raises(Diverged, match=r"parameter '2\.weight'"):
            MonoForward(order=order).fit(deepcopy(model), TRAIN.batches(64), epochs=1)


@pytest.mark.parametrize("rule", [MonoForward(), ForwardForward(), CascadedForward()], ids=str)
def test_bad_input(rule):
    with pytest.raises(BadInput, match="no samples"):
        rule.fit(mlp(8), [], epochs=1)
    with pytest.raises(BadInput, match="finite"):
        rule.fit(mlp(8), [(BATCH[0] * torch.nan, BATCH[1])], epochs=1)
    with pytest.raises(BadInput, match="integer class"):
        rule.fit(mlp(8), [(BATCH[0], BATCH[0])], epochs=1)
    with pytest.raises(BadInput, match="class -1"):
        rule.fit(mlp(8), [(BATCH[0], BATCH[1] - 1)], epochs=1)


def test_models_that_a_rule_cannot_train_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"^3: the last block must be a linear layer"):
        MonoForward().fit(mlp(8, 10, head=False), TRAIN.batches(64), epochs=1)
    with pytest.raises(UnsupportedModel, match=r"^0: Forward-Forward needs"):
        ForwardForward().fit(nn.Sequential(nn.Linear(64, 10)), TRAIN.batches(64), epochs=1)
    with pytest.raises(UnsupportedModel, match=r"^2: .*equally long"):  # a layer norm leaves goodness nothing to say
        ForwardForward().fit(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 10)), TRAIN.batches(64), epochs=1)
    with pytest.raises(BadInput, match="10 outputs"):
        MonoForward().fit(mlp(8), [(BATCH[0], BATCH[1] + 5)], epochs=1)
    with pytest.raises(BadInput, match="order"):
        MonoForward(order="up").fit(mlp(8), TRAIN.batches(64), epochs=1)
    with pytest.raises(UnsupportedModel, match="no block has a parameter"):
        MonoForward(input_readout=False).fit(mlp(8).requires_grad_(False), TRAIN.batches(64), epochs=1)


def test_a_linear_model_and_frozen_layers_are_fine():
    linear = nn.Sequential(nn.Linear(64, 10))
    MonoForward().fit(linear, TRAIN.batches(32), epochs=4)
    assert evaluate(linear, VALID)["accuracy"] > 0.8
    model = mlp(32, 32)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    MonoForward().fit(model, TRAIN.batches(64), epochs=1)
    assert torch.equal(before, model[0].weight)
