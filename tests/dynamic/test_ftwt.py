"""Predicted channel masks: the targets, what gathering computes and costs, and where gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.channel import FTWT
from neurarium.dynamic.channel_conv import ChannelConv, target_mask
from neurarium.dynamic.compile import split
from neurarium.dynamic.train import fit_policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing import exits as checks


class Block(nn.Module):
    """A residual block: only its first convolution is followed by a ReLU alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.last(self.second(F.relu(self.norm(self.first(x))))))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False), nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), Block(6), Block(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


def mobile() -> nn.Module:
    def unit(i: int, o: int) -> list[nn.Module]:
        depth = nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False)
        return [depth, nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), *unit(6, 8), *unit(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


MODELS = {"vgg": vgg, "resnet": resnet, "mobile": mobile}


def batch(n: int = 20, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g) * (0.2 + 2 * torch.rand(n, 1, 1, 1, generator=g)) + torch.randn(n, 1, 1, 8, generator=g)


def labels(n: int = 20) -> torch.Tensor:
    return torch.arange(n) % 3


def dense(kind: str, seed: int = 0) -> nn.Module:
    """Not trained, but with statistics and biases that are not those of a fresh layer."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.normal_(m.bias, std=0.3)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    for _ in range(5):
        model(batch(seed=seed))
    return model.eval()


def policy(kind: str = "vgg", granularity: int = 1, **options) -> FTWT:
    """Predictors that answer differently from row to row."""
    made = FTWT(dense(kind), granularity=granularity, **{"embedding": 16, "whole_below": 1, **options}).eval()
    torch.manual_seed(1)
    for p in made.predictors():
        nn.init.normal_(p, std=1.0)
    made.calibrate([(batch(seed=3), labels())], grid=6)
    return made


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.9, 1.0])
def test_target_is_two_lines_of_numpy(mass):
    out = torch.randn(30, 7, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
    out[:5, 2] = out[:5, 1]  # ties
    out[5, :6] = 0
    got = target_mask(out, mass=mass).numpy()
    for row, mask in zip(out.double().numpy(), got):
        share = (heat := row.max((1, 2))) / heat.sum()
        order = np.argsort(-share, kind="stable")
        keep = {order[0], *(c for c, m in zip(order, np.cumsum(share[order])) if (m <= mass + 1e-5 if mass < 1 else share[c] > 1e-5))}
        assert set(np.flatnonzero(mask)) == keep


def test_target_extremes():
    out = torch.rand(4, 6, 3, 3)
    assert target_mask(out, mass=2.0).all()
    assert (target_mask(out, mass=1e-6).sum(1) == 1).all()
    assert (target_mask(torch.zeros(4, 6, 3, 3)).sum(1) >= 1).all()
    uniform = target_mask(out, mass=0.7, target="uniform")
    assert (uniform.sum(1) == 6 - int(0.3 * 6)).all()
    heat = out.amax((2, 3))
    assert (heat[0][uniform[0]].min() >= heat[0][~uniform[0]].max()).all()


@pytest.mark.parametrize(
    ("kind", "granularity", "whole_below"), [("vgg", 1, 1), ("vgg", 3, 1), ("resnet", 1, 1), ("mobile", 1, 1), ("vgg", 1, 20)]
)
def test_policy_keeps_the_contract(kind, granularity, whole_below):
    made, x = policy(kind, granularity, whole_below=whole_below), batch()
    assert len(made.decide(x).choice.unique(dim=0)) > 1  # rows differ
    for check in checks.CHECKS:
        if check is not checks.check_thresholds:  # a threshold on single filters, not on exits
            check(made, x)
    checks.check_loss(made, x, labels())


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_left_out_is_the_dense_network(kind):
    model, made, x = dense(kind), policy(kind), batch()
    assert torch.equal(made.decide(x, threshold=-1.0, mode="masked").output, model(x))
    everything = made.decide(x, threshold=-1.0)
    torch.testing.assert_close(everything.output, model(x), rtol=1e-4, atol=1e-5)
    assert (everything.cost == made.costs(x).full).all() and (everything.choice == torch.tensor(made.filters)).all()
    least = made.decide(x, threshold=2.0)
    assert (least.choice == 1).all() and (least.cost == made.costs(x).total[0]).all()


def test_cost_is_the_formula_of_kept_filters():
    made, x = policy("vgg"), batch()
    outcome = made.decide(x)
    a, b, c = outcome.choice.T
    convolutions = 2 * 9 * (64 * a * 1 + 4 * a * b + 4 * b * c)
    predictors = 2 * (1 * 16 * 6 + 6 * 4 * 8 + 8 * 1 * 5)
    assert torch.equal(outcome.cost, convolutions + predictors + 2 * 20 * 3)


def test_small_maps_are_computed_whole_and_charged_so():
    made, sparse, x = policy("vgg", whole_below=5), policy("vgg"), batch()  # maps of 64, 4 and 4 positions
    outcome, want = made.decide(x), sparse.decide(x)
    torch.testing.assert_close(outcome.output, want.output, rtol=1e-4, atol=1e-5)
    assert torch.equal(outcome.choice, want.choice)
    predictors = 2 * (1 * 16 * 6 + 6 * 4 * 8 + 8 * 1 * 5)
    assert torch.equal(outcome.cost, 2 * 9 * (64 * outcome.choice[:, 0] + 4 * 6 * 8 + 4 * 8 * 5) + predictors + 2 * 20 * 3)
    everything = policy("vgg", whole_below=65)
    assert (everything.decide(x).cost == everything.full(x)).all() and everything.predicted_flops([(x, labels())]) == everything.full(x)
    image = torch.zeros(1, 1, 9, 6)
    for options in ({"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"padding": (2, 0)}):
        layer = ChannelConv(nn.Conv2d(1, 2, 3, **options), None, None, None, made.plan)
        assert layer.positions(image) == layer.conv(image)[0, 0].numel()


def test_residual_blocks_prune_the_inside_and_read_it_sparsely():
    made = policy("resnet")
    assert made.dynamic == ("0", "2.first", "3.first")
    layers = {m.name: m for m in made.model.modules() if isinstance(m, ChannelConv)}
    assert layers["2.second"].predictor is None and layers["2.second"].source == "2.first"
    assert layers["2.first"].source == "0" and layers["3.first"].source == ""  # after the addition everything is read


def test_masks_leave_out_what_the_predictor_says():
    made, x = policy("vgg"), batch()
    seen: dict = {}
    _, plan = made._pass(x, "masked", seen=seen)
    for name in made.dynamic:
        said = seen[name][0] > 0
        kept = plan.kept[name]
        assert torch.equal(kept[said.any(1)], said[said.any(1)]) and (kept.sum(1) >= 1).all()
    with torch.no_grad():
        _, compact = made._pass(x, "compact")
    assert all(torch.equal(compact.kept[n], plan.kept[n]) for n in made.dynamic)


@pytest.mark.parametrize(("mode", "reached"), [("decoupled", False), ("joint", True)])
def test_task_gradients_reach_predictors_only_in_joint_mode(mode, reached):
    made, x = policy("vgg", mode=mode), batch()
    F.cross_entropy(made.masked(x), labels()).backward()
    for p in made.predictors():
        assert (p.grad is not None and bool(p.grad.any())) is reached
    made.zero_grad(set_to_none=True)
    layer = made._layer(made.dynamic[2])
    seen: dict = {}
    made._pass(x, "masked", seen=seen)
    goal = made.goal(seen[layer.name][1])
    F.binary_cross_entropy_with_logits(seen[layer.name][0], goal.float()).backward()
    first = made._layer(made.dynamic[0]).conv.weight.grad
    assert (first is not None and bool(first.any())) is reached


def test_phases_move_what_they_name():
    made, x = FTWT(dense("vgg"), granularity=1, freeze_after=2), batch()
    moved = {}
    for epoch in range(3):
        made.begin_epoch(epoch, 0, None)
        before = {n: p.detach().clone() for n, p in made.named_parameters()}
        optimizer = torch.optim.SGD(made.groups(), momentum=0.0)
        made.train().loss(x, labels()).backward()
        for p in set(made.parameters()) - set(made.trainable()):
            p.grad = None
        optimizer.step()
        made.zero_grad(set_to_none=True)
        moved[epoch] = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    predictors = {n for n, _ in made.named_parameters() if "predictor" in n}
    assert moved[0] <= predictors and moved[0]
    assert moved[1] & predictors and moved[1] - predictors
    assert moved[2] and not moved[2] & predictors


def test_predicted_flops_are_what_perfect_predictors_cost():
    made, x = policy("vgg", granularity=2), batch()
    seen: dict = {}
    made._pass(x, "dense", seen=seen)
    counts = [made.plan.round(made.goal(seen[n][1]).sum(1), f) for n, f in zip(made.dynamic, made.filters)]
    expected = float(made.price(x, counts).double().mean())
    assert made.predicted_flops([(x, labels())]) == pytest.approx(expected)
    assert made.costs(x).total[0] <= expected <= made.full(x)
    generous = FTWT(dense("vgg"), mass=2.0)
    assert generous.predicted_flops([(x, labels())]) == generous.full(x)


def test_predictors_learn_their_targets_better_than_any_constant_mask():
    model, x = dense("vgg"), batch(200, seed=5)
    made = FTWT(model, granularity=1, embedding=64, warmup_epochs=9, mass=0.8)
    fit_policy(
        made, [(p, labels(len(p))) for p in x.split(20)], epochs=8, optimizer=lambda _: torch.optim.Adam(made.groups(predictor_lr=0.02))
    )
    seen: dict = {}
    made.eval()._pass(x, "dense", seen=seen)
    right = [((seen[n][0] > 0) == made.goal(seen[n][1])).double().mean().item() for n in made.dynamic]
    constant = [(g := made.goal(seen[n][1]).double().mean(0)).maximum(1 - g).mean().item() for n in made.dynamic]
    assert np.mean(right) > np.mean(constant) + 0.02


def test_chunks_change_no_decision():
    made, x = policy("vgg"), batch()
    whole = made.decide(x)
    for chunk in (None, 1, 7):
        made.chunk = chunk
        part = made.decide(x)
        assert torch.equal(part.choice, whole.choice) and torch.equal(part.cost, whole.cost)
        torch.testing.assert_close(part.output, whole.output, rtol=1e-4, atol=1e-5)


def test_gradients_through_compact_equal_those_through_masked():
    made, x, grads = policy("vgg"), batch(6), []
    for mode in ("compact", "masked"):
        made.zero_grad(set_to_none=True)
        made.decide(x, mode=mode).output.square().sum().backward()
        grads.append([m.conv.weight.grad.clone() for m in made.model.modules() if isinstance(m, ChannelConv)])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_split_agrees_with_the_policy():
    made, x = policy("vgg"), batch()
    made.calibrate([(x, labels())], grid=2)
    program = split(made, x)
    for setting in ({}, *({"budget": b} for b in checks.budgets(made, x, 2))):
        got, want = program.decide(x, **setting), made.decide(x, mode="masked", **setting)
        torch.testing.assert_close(got.output, want.output, rtol=1e-4, atol=1e-5)
        assert torch.equal(got.choice, want.choice) and torch.equal(got.cost, want.cost)
    made.curve = None  # one segment is enough to see that the masked form exports
    exported = split(made, x).compile("export")
    for n in (0, 1, 7):
        torch.testing.assert_close(exported.decide(x[:n]).output, made.masked(x[:n]), rtol=1e-4, atol=1e-5)


def test_layers_can_be_named():
    made, x = policy("vgg", layers=["4"]), batch()
    assert made.dynamic == ("4",) and made.decide(x).choice.shape == (20, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outcome = made.decide(x)
    assert counter.get_total_flops() == int(outcome.cost.sum()) < 20 * made.full(x)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: FTWT(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), UnsupportedModel),
        (lambda x: FTWT(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU())), UnsupportedModel),
        (lambda x: FTWT(vgg(), layers=["7", "3"]), BadInput),
        (lambda x: FTWT(vgg(), mass=0), BadInput),
        (lambda x: FTWT(vgg(), granularity=0), BadInput),
        (lambda x: FTWT(vgg(), mode="both"), BadInput),
        (lambda x: FTWT(vgg()).decide(x, budget=1e9), BadInput),
        (lambda x: FTWT(vgg()).decide(x[0]), BadInput),
        (lambda x: FTWT(vgg()).decide(x * float("nan")), BadInput),
        (lambda x: FTWT(vgg()).decide(x, mode="fast"), BadInput),
        (lambda x: FTWT(vgg()).loss(x, labels() + 5), BadInput),
        (lambda x: FTWT(vgg()).calibrate([]), BadInput),
        (lambda x: FTWT(vgg()).calibrate([(x * float("nan"), labels())]), BadInput),
        (lambda x: FTWT(vgg()).predicted_flops([]), BadInput),
    ],
)
def test_bad_input_is_refused(call, error):
    with pytest.raises(error):
        call(batch())
