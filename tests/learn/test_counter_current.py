"""Counter-current learning: what each level's loss trains, that nothing else reaches it, and that the mirror fits any chain."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain
from neurarium.learn.counter_current import CounterCurrent, mirror
from neurarium.learn.fit import Diverged, evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.testing.locality import assert_local

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
TRAIN, VAL = TensorData((X.float() - 4.9) / 6, Y).split(1200, seed=0)
VALID = VAL.batches(300, shuffle=False)
BATCH = TRAIN[:48]


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in zip((64, *widths), widths) for m in (nn.Linear(a, b, bias=False), nn.ELU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10, bias=False))


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def transformer():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), Pool(), nn.Linear(16, 10)
    )  # fmt: skip


def updates(rule, model, batch=BATCH):
    """What one batch does to the forward weights and to the feedback network's."""
    trained = deepcopy(model)
    rule.fit(trained, [batch], epochs=1)
    return [a.detach() - b.detach() for a, b in zip(trained.parameters(), model.parameters())], rule.trained(trained).feedback


PLAIN = CounterCurrent(clip=None)


@pytest.mark.parametrize("make", [partial(mlp, 32, 24, 16), cnn, transformer])
def test_without_the_clip_nothing_crosses_between_levels(make):
    assert_local(PLAIN, make(), BATCH)


def test_each_forward_map_follows_the_closed_form_of_its_own_level():
    model = mlp(20, 14).double()
    x, y = BATCH[0].double(), BATCH[1]
    moved, _ = updates(PLAIN, model, (x, y))
    frozen = CounterCurrent(clip=None, feedback_optimizer=partial(SGD, lr=0.0))
    twin = deepcopy(model)
    frozen.fit(twin, [(x, y)], epochs=1)
    back = frozen.trained(twin).feedback
    with torch.no_grad():
        s2 = back[2](torch.eye(10, dtype=torch.float64))
        signals = [back[1](s2), s2]
        h = x
        for level, layer in enumerate((0, 2)):
            w, s = model[layer].weight, signals[level]
            pre = h @ w.T
            a = F.elu(pre)
            residual = (a @ s.T - F.one_hot(y, 10)) @ s  # (samples, features)
            slope = torch.where(pre > 0, torch.ones_like(pre), pre.exp())
            gradient = 2 * 0.5 * 256 / (len(x) * 10 * a.shape[1]) * (residual * slope).T @ h
            torch.testing.assert_close(moved[level], -gradient, rtol=1e-6, atol=1e-12)
            h = a
        error = (h @ model[4].weight.T).softmax(1) - F.one_hot(y, 10)
        torch.testing.assert_close(moved[2], -error.T @ h / len(x), rtol=1e-6, atol=1e-12)


def test_a_forward_map_hears_of_the_feedback_maps_above_it_and_of_no_others():
    model = mlp(20, 16, 12)

    class Disturbed(CounterCurrent):
        def objective(self, chain, facts):
            made = super().objective(chain, facts)
            with torch.no_grad():
                made.feedback[at][0].weight.mul_(3)
            return made

    reference, _ = updates(PLAIN, model)
    for at in range(4):  # feedback[at] is R_{at+1}
        moved, _ = updates(Disturbed(clip=None), model)
        same = [torch.equal(a, b) for a, b in zip(moved, reference)]
        assert same == [at < level if level < 4 else True for level in (1, 2, 3, 4)], (at, same)


def test_the_input_level_trains_the_lowest_feedback_map_alone_and_the_top_trains_none():
    model = nn.Sequential(nn.Linear(64, 10, bias=False))
    one = CounterCurrent(clip=None)
    trained = deepcopy(model)
    one.fit(trained, [BATCH], epochs=1)
    objective = one.trained(trained)
    back = objective.feedback[0][0].weight
    assert [len(objective.learned(i)) for i in (0, 1)] == [1, 1] and objective.learned(0)[0] is back
    with torch.no_grad():  # with one layer the forward network does plain softmax regression
        error = model(BATCH[0]).softmax(1) - F.one_hot(BATCH[1], 10)
        torch.testing.assert_close(trained[0].weight, model[0].weight - error.T @ BATCH[0] / len(BATCH[0]))


def test_prototypes_are_the_per_sample_formulation_restricted_to_one_column_a_class():
    model = mlp(20, 16)
    PLAIN.fit(model, [BATCH], epochs=1)
    objective = PLAIN.trained(model)
    x, y = BATCH
    h = model[:2](objective.enter(x, y))
    _, c = objective.loss(1, x, h, y)
    with torch.no_grad():
        per_sample = h @ objective.feedback[1](objective.feedback[2](F.one_hot(y, 10).float())).T  # (samples, samples)
        torch.testing.assert_close(c[:, y], per_sample)
        torch.testing.assert_close(F.one_hot(y, 10)[:, y], (y[:, None] == y).long())


def test_the_clip_is_one_norm_for_each_network():
    model = mlp(20, 16)
    free, clipped = updates(PLAIN, model)[0], updates(CounterCurrent(clip=1e-2), model)[0]
    norm = torch.stack([u.norm() for u in free]).norm()
    for a, b in zip(free, clipped):
        torch.testing.assert_close(b, a * 1e-2 / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [partial(mlp, 20, 16), cnn, transformer])
def test_the_mirror_has_the_shapes_of_the_chain_and_weights_of_its_own(make):
    model = make()
    chain = as_chain(model, BATCH[0])
    back = mirror(chain, BATCH[0])
    s = torch.eye(10)
    for layer, shape in zip(reversed(back), [chain.input_shape, *chain.shapes[:-1]][::-1]):
        s = layer(s)
        assert s.shape == (10, *shape)
    assert not set(back.parameters()) & set(model.parameters())


def test_it_learns_where_random_features_do_not_suffice():
    learned, features = mlp(48, 48, 48), mlp(48, 48, 48)
    CounterCurrent().fit(learned, TRAIN.batches(32), epochs=6)
    CounterCurrent(scale=0.0).fit(features, TRAIN.batches(32), epochs=6)
    found, base = evaluate(learned, VALID)["accuracy"], evaluate(features, VALID)["accuracy"]
    assert found > 0.85 and found > base + 0.05, (found, base)


def test_a_convolutional_and_an_attention_network_learn():
    rule = CounterCurrent(optimizer=partial(SGD, lr=0.1, momentum=0.8))
    for make, least in ((cnn, 0.8), (transformer, 0.4)):
        model = make()
        rule.fit(model, TRAIN.batches(32), epochs=4)
        assert evaluate(model, VALID)["accuracy"] > least


def test_cosine_levels_compare_directions_only():
    model = mlp(20, 16)
    rule = CounterCurrent(similarity="cosine", self_similarity=0.5)
    rule.fit(model, [BATCH], epochs=1)
    objective = rule.trained(model)
    h = model[:2](objective.enter(*BATCH))
    for factor in (1.0, 7.0):
        loss, c = objective.loss(1, h, factor * h, BATCH[1])
        a, s = F.normalize(h), F.normalize(objective.feedback[1](objective.signals[1]))
        want = 0.5 * (a @ s.T - F.one_hot(BATCH[1], 10)).square().mean()
        want = want + 0.5 * (a @ a.T - torch.eye(len(a))).square().mean() + 0.5 * (s @ s.T - torch.eye(10)).square().mean()
        torch.testing.assert_close(loss, want)
        assert float(c.detach().abs().max()) <= 1 + 1e-6


def test_alignment_is_one_at_the_top_and_defined_below():
    found = gradient_alignment(CounterCurrent(), mlp(20, 16), BATCH)
    assert found["4.weight"] == pytest.approx(1, abs=1e-5)
    assert abs(found["0.weight"]) < 0.95


def test_a_learned_feedback_network_can_be_gone_on_with():
    model, rule = mlp(32, 32), CounterCurrent()
    rule.fit(model, TRAIN.batches(32), epochs=3)
    learned = rule.trained(model).feedback
    with_it = CounterCurrent(clip=None, feedback=learned)
    before = deepcopy(learned.state_dict())
    loss = [r.fit(deepcopy(model), [BATCH], epochs=1).last["accuracy"] for r in (with_it, rule)]
    assert loss[0] == loss[1]  # the first forward pass is the same
    kept, fresh = (updates(r, model)[0][1] for r in (with_it, CounterCurrent(clip=None)))
    assert kept.norm() < fresh.norm()  # levels that already agree have less to change
    assert all(torch.equal(v, before[k]) for k, v in learned.state_dict().items())


def test_token_inputs_have_no_level_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 8), Pool(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
    tokens = X.long()[:64]
    CounterCurrent().fit(model, [(tokens, Y[:64])], epochs=1)


def test_refusals():
    with pytest.raises(UnsupportedModel, match=r"^1: the last block"):
        CounterCurrent().fit(mlp(8)[:2], [BATCH], epochs=1)
    with pytest.raises(BadInput, match="10 outputs"):
        CounterCurrent().fit(mlp(8), [(BATCH[0], BATCH[1] + 5)], epochs=1)
    for wrong in (CounterCurrent(order="greedy"), CounterCurrent(similarity="angle")):
        with pytest.raises(BadInput):
            wrong.fit(mlp(8), [BATCH], epochs=1)
    broken = mlp(8, 8)
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.inf
    with pytest.raises(Diverged, match=r"parameter '2\.weight'"):
        CounterCurrent().fit(broken, [BATCH], epochs=1)
