"""ProARD: losses, phases, and what a step may touch."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic import robust_family
from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import Config, ElasticFamily, slots
from neurarium.dynamic.robust_family import ProARD, dimensions, rslad_loss, trades_loss
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.examples.dynamic.robust import _family, _images

x, y = _images(16, 5)
FAST = {"eps": 0.1, "step": 0.05, "attack_steps": 2, "teacher_epochs": 1, "stage_epochs": 1, "open_epochs": 1, "warmup": 0}


def plain_sgd(parameters):
    return SGD(parameters, lr=0.1)


def test_losses_are_zero_where_student_and_teacher_agree():
    logits = 3 * torch.randn(9, 4, dtype=torch.float64)
    assert rslad_loss(logits, logits, logits.softmax(-1)).item() == pytest.approx(0, abs=1e-12)
    labels = torch.arange(9) % 4
    assert trades_loss(logits, logits, labels, 6.0).item() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_rslad_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    clean, attacked = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.5, 0.3]]).double()
    kl = [(p * (p / q).log()).sum().item() for q in (clean, attacked)]
    assert rslad_loss(clean.log(), attacked.log(), p).item() == pytest.approx(kl[0] / 6 + 5 * kl[1] / 6)


def test_dimensions_are_told_apart_by_who_uses_them():
    family = _family(0)
    names = [w.name for w in slots(family.model)[0]]
    found = dimensions(family)
    assert [names[i] for i in found["width"]] == ["stage 0", "stage 1"]
    assert [names[i] for i in found["expand"]] == ["expand 1.0"] and found["depth"] == (3,)


def test_students_enter_one_dimension_after_another_large_ones_first():
    family = _family(0)
    learner = ProARD(stages=("depth", "width", "expand"), accumulate=(1, 2, 4), **FAST)
    teacher, depth, middle, width, expand = learner.phases(family)
    assert teacher.configs == (family.configs[-1],) == (Config((4, 6, 6), (1,)),)
    assert set(depth.configs) == {Config((4, 6, 6), (d,)) for d in (0, 1)}
    assert set(middle.configs) == {Config((4, w, 6), (d,)) for w in (4, 6) for d in (0, 1)}  # the smallest width is not open yet
    assert set(width.configs) == {Config((4, w, 6), (d,)) for w in (2, 4, 6) for d in (0, 1)}
    assert set(expand.configs) == set(family.configs) and len(family.configs) == 12
    assert [p.draws for p in (depth, middle, width, expand)] == [1, 2, 2, 4]
    assert [p.opens for p in (depth, middle, width, expand)] == [("depth",), ("width",), (), ("expand",)]
    assert middle.rate == pytest.approx(1 / 3) and all(p.rate == 1 for p in (depth, width, expand))
    everything = ProARD(stages=(("width", "depth", "expand"),), accumulate=(4,), **FAST).phases(family)
    assert len(everything) == 2 and set(everything[1].configs) == set(family.configs)


def test_every_update_draws_only_students_that_are_open():
    family, seen = _family(0), []
    learner = ProARD(stages=("width", "expand"), accumulate=(1, 2), **FAST)
    original = ProARD.loss

    def spy(self, model, config, *rest):
        seen.append(config)
        return original(self, model, config, *rest)

    with mock.patch.object(ProARD, "loss", spy):
        learner.fit(family, [(x, y)] * 4, epochs=3)
    assert set(seen[:4]) == {family.configs[-1]} and len(seen) == 4 + 4 + 8
    assert all(c.key[2:] == (6, 1) for c in seen[4:8]) and all(c.depths == (1,) for c in seen[8:])
    assert {c.key[2] for c in seen[8:]} == {2, 6}


def test_the_teacher_is_the_largest_network_as_it_was_and_does_not_move():
    family = _family(0)
    learner = ProARD(stages=("width",), accumulate=(1,), optimizer=plain_sgd, **FAST)
    first = learner.fit(family, [(x, y)] * 2, epochs=1)
    trained = copy.deepcopy(family)
    later = learner.fit(family, [(x, y)] * 2, epochs=3, resume=first.state)
    kept = later.state["parts"]["teacher"]
    assert all(torch.equal(kept[name], value) for name, value in trained.state_dict().items())
    assert not all(torch.equal(a, b) for a, b in zip(family.parameters(), trained.parameters()))


def test_sorting_units_changes_nothing_that_the_largest_network_says():
    family = _family(0)
    before = copy.deepcopy(family).eval()
    robust_family._sort_units(family, ("width", "depth", "expand"))
    assert not all(torch.equal(a, b) for a, b in zip(family.parameters(), before.parameters()))
    torch.testing.assert_close(family.eval()(x), before(x), rtol=1e-5, atol=1e-6)
    score = robust_family_scores(family)
    assert all(torch.equal(s, s.sort(descending=True).values) for s in score)
    only = copy.deepcopy(before)
    robust_family._sort_units(only, ("expand",))
    assert torch.equal(only.model.stages[0][0].weight, before.model.stages[0][0].weight)  # its order has been learned
    robust_family._sort_units(only, ("depth",))


def robust_family_scores(family: ElasticFamily) -> list[torch.Tensor]:
    from neurarium.dynamic.elastic import units

    return [units(family.model, w).view(-1, w.step).sum(1) for w in slots(family.model)[0]]


def test_without_attack_and_distillation_the_teacher_is_ordinary_training():
    family = _family(0)
    twin = copy.deepcopy(family)
    ProARD(stages=(), accumulate=(), optimizer=plain_sgd, **(FAST | {"eps": 0.0})).fit(family, [(x, y)], epochs=1)
    F.cross_entropy(twin(x), y).backward()
    SGD(twin.parameters(), lr=0.1).step()
    for a, b in zip(family.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_attack_stays_in_the_ball_and_raises_the_divergence():
    family, learner = _family(0).eval(), ProARD(eps=0.1, step=0.03, attack_steps=5)
    for config in family.configs[::5]:
        taught = family(x).softmax(-1).detach()
        attacked = learner.attack(family, config, x, taught)
        assert (attacked - x).abs().max() <= 0.1 + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
        with torch.no_grad():
            before, after = (rslad_loss(family.run(z, config), family.run(z, config), taught) for z in (x, attacked))
        assert after > before
    assert learner.attack(family, family.configs[0], x, None).requires_grad is False


def test_attacks_leave_batch_statistics_alone():
    """Of a student's update only the two forward passes of the loss may move them."""
    family, moved = _family(0, norm="batch"), []
    original = F.batch_norm

    def spy(x, mean, var, weight, bias, training, *rest):
        moved.append(training)
        return original(x, mean, var, weight, bias, training, *rest)

    family.train()
    taught = torch.full((16, 3), 1 / 3)
    with mock.patch("torch.nn.functional.batch_norm", spy):
        ProARD(eps=0.1, step=0.05, attack_steps=3).loss(family, family.configs[-1], x, y, taught)
    norms = sum(m.batch for m in family.modules() if hasattr(m, "batch"))
    assert sum(moved) == 2 * norms and len(moved) == 5 * norms
    history = ProARD(**FAST).fit(family, [(x, y)], epochs=5)
    assert history.steps == 5 and torch.isfinite(family.eval()(x)).all()


def test_flops_are_counted_to_the_last_digit():
    learner = ProARD(stages=("width", "depth"), accumulate=(1, 3), **FAST)
    family = _family(0)
    with robust_family._Flops() as everything:
        history = learner.fit(family, [(x, y)] * 3, epochs=4)
    assert history.extra["flops"][-1] == everything.total and len(history.extra["flops"]) == 4
    with FlopCounterMode(display=False) as torchs, robust_family._Flops() as ours:
        F.cross_entropy(_family(0)(x), y).backward()
    assert torchs.get_total_flops() == ours.total > 0


def test_what_it_cannot_train_is_refused():
    model = ElasticBackbone(classes=3, widths=(4, 6), strides=(2, 1), blocks=(0, 1))
    example = torch.zeros(2, 1, 8, 8)
    same_depth = ElasticFamily(model, [Config((4, w, 6), (1,)) for w in (2, 6)], example)
    with pytest.raises(UnsupportedModel, match="depth"):
        ProARD(**FAST).fit(same_depth, [(x, y)], epochs=1)
    sideways = ElasticFamily(model, [Config((2, 6, 6), (1,)), Config((4, 2, 6), (1,))], example)
    with pytest.raises(UnsupportedModel, match="contains all others"):
        ProARD(stages=("width",), accumulate=(1,)).phases(sideways)
    measured = _family(0, norm="batch")
    for m in measured.modules():
        if hasattr(m, "statistics"):
            m.statistics = "recalibrate"
    with pytest.raises(UnsupportedModel, match="statistics"):
        ProARD().phases(measured)
    with pytest.raises(UnsupportedModel):
        ProARD().fit(nn.Linear(3, 3), [(x, y)], epochs=1)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": (1, 2)},
        {"accumulate": (1, 2, 0)},
        {"stages": ("width", "height"), "accumulate": (1, 1)},
        {"kd": "ard"},
        {"eps": -0.1},
        {"eps": float("nan")},
        {"stage_epochs": 0},
        {"stages": (), "accumulate": (), "teacher_epochs": 0},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(BadInput):
        ProARD(**options)


@pytest.mark.parametrize("target", [y + 3, y.float(), y[:5], -y - 1])
def test_bad_labels_are_refused_before_anything_changes(target):
    family = _family(0)
    before = copy.deepcopy(family.state_dict())
    with pytest.raises(BadInput):
        ProARD(**FAST).fit(family, [(x, target)], epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), family.state_dict().values()))
