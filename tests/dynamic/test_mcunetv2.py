"""Patch-based inference: published numbers, equality with the plain network, and plans that an allocation trace confirms."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.live import BufferTrace, kernel, trace_memory
from neurarium.dynamic.mobile import MOBILENET_V2, Block, InvertedResidual, MobileConfig, flops, mobile_net, redistribute
from neurarium.dynamic.patch import patch_inference, plan_memory, search_schedule
from neurarium.errors import BadInput, UnsupportedModel


def counted(model, x) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def settled(model: nn.Module) -> nn.Module:
    """BatchNorms that do something."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            if m.affine:
                nn.init.normal_(m.bias, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def mobile():
    """MobileNetV2 layer by layer and in 4x4 tiles up to child 4, the first block of stride 8."""
    torch.manual_seed(0)
    model, x = settled(mobile_net()), torch.randn(1, 3, 224, 224)
    return model, x, [patch_inference(model, x, patches=(4, 4), split=split) for split in (0, "4")]


def extent(patched) -> int:
    return max(b - a for spans in patched.tiles().values() for a, b in spans[patched.graph.source])


def test_published_numbers_of_mobilenet_v2(mobile):
    _, x, (layer, patched) = mobile
    assert layer.plan().peak == 112 * 112 * (16 + 96) == 1372 * 1024
    plan = patched.plan()
    assert plan.peak == 28 * 28 * (32 + 192) == 171.5 * 1024 and layer.plan().peak / plan.peak == 8
    assert extent(patched) == 75
    assert patched.overhead == pytest.approx(0.0928, abs=1e-4)
    patched.flags = True, False
    assert patched.plan().peak == 28 * 28 * (32 + 192 + 32) == 196 * 1024  # a residual that is counted twice
    patched.flags = True, True
    assert plan_memory(patched, x).peak == plan.peak


def test_trace_of_the_executed_network_equals_the_plan(mobile):
    model, x, schedules = mobile
    with torch.no_grad():
        want = model(x)
        for patched in schedules:
            memory = trace_memory(patched, x)
            assert memory.peak == patched.plan(bytes_per=4).peak == 4 * patched.plan().peak
            torch.testing.assert_close(patched(x), want, rtol=1e-5, atol=1e-6)


def test_redistribution_of_mobilenet_v2(mobile):
    x = mobile[1]
    config = redistribute(MOBILENET_V2, x)
    with torch.device("meta"):
        model = mobile_net(config).eval()
    assert flops(config, x) == counted(model, x.to("meta")) and flops(MOBILENET_V2, x) == mobile[2][0].graph.flops
    assert abs(flops(config, x) / flops(MOBILENET_V2, x) - 1) < 0.02
    patched = patch_inference(mobile_net(config).eval(), x, patches=(4, 4), split="3")
    assert [b.stride for b in config.blocks[:3]] == [1, 2, 2]  # child 3 is the first of stride 8
    assert extent(patched) == 63 and patched.overhead < 0.03 and patched.plan().peak <= 171.5 * 1024


class Residual(nn.Module):
    def __init__(self, width: int, kernel: int, act: bool, downsample: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.b = nn.Conv2d(width, width, 1)
        self.short = nn.Conv2d(width, width, 1) if downsample else nn.Identity()
        self.act = act

    def forward(self, x):
        y = self.b(self.a(x)) + self.short(x)
        return torch.relu(y) if self.act else y


class Branches(nn.Module):
    """Two reaches of one map, side by side; one is used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2, 5, padding=2), nn.Conv2d(width, 2, 1)

    def forward(self, x):
        y = self.b(x)
        return torch.cat([self.a(x), y, y * torch.sigmoid(y)], 1)


def random_net(r: random.Random) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for _ in range(r.randint(2, 5)):
        kind, k = r.choice(["conv", "conv", "even", "same", "pool", "mean", "residual", "branches", "depthwise"]), r.choice([1, 3, 5])
        if kind in ("conv", "even", "same"):
            out = r.choice([2, 4])
            if kind == "same":
                layers.append(nn.Conv2d(width, out, r.choice([2, 3, 4]), padding="same", dilation=r.choice([1, 2])))
            elif kind == "even":
                layers.append(nn.Conv2d(width, out, 4, r.choice([1, 2]), r.choice([0, 1])))
            else:
                layers.append(nn.Conv2d(width, out, (k, 3), r.choice([1, 2]), (k // 2, 1), bias=r.random() < 0.5))
            layers += r.choice(
                [[], [nn.BatchNorm2d(out), nn.ReLU()], [nn.GELU()], [nn.ReLU6(inplace=True), nn.BatchNorm2d(out, affine=False)]]
            )
            width = out
        elif kind == "pool":
            layers.append(nn.MaxPool2d(3, r.choice([1, 2]), 1))
        elif kind == "mean":
            layers.append(nn.AvgPool2d(r.choice([2, 3]), r.choice([1, 2]), r.choice([0, 1])))
        elif kind == "residual":
            layers.append(Residual(width, k, r.random() < 0.5, r.random() < 0.5))
        elif kind == "branches":
            layers.append(Branches(width))
            width = 6
        else:
            layers += [nn.Conv2d(width, width, k, r.choice([1, 2]), k // 2, groups=width), nn.PReLU(width)]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_give_the_same_and_need_what_is_planned(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    model = settled(random_net(r)).double()
    x = torch.randn(2, 3, r.randint(17, 26), r.randint(17, 26), dtype=torch.float64)
    flags = {"inplace_depthwise": r.random() < 0.7, "inplace_add": r.random() < 0.7}
    local = len(model) - 3
    graph = patch_inference(model, x, split=0)
    splits = [i for i, name in enumerate(graph.blocks, 1) if int(name.split(".")[0]) < local]
    for split in {0, r.choice(splits), splits[-1]}:
        height, width = graph.graph.ops[graph.graph.stage(split) - 1].shape[1:] if split else (1, 1)
        tiles = r.randint(1, min(3, height)), r.randint(1, min(3, width))
        patched = patch_inference(model, x, patches=tiles, split=split, **flags)
        want = model(x)
        torch.testing.assert_close(patched(x), want, rtol=1e-10, atol=1e-10)  # as autograd sees it
        before = x.clone()
        with torch.no_grad():
            torch.testing.assert_close(patched(x), want, rtol=1e-10, atol=1e-10)  # in place
            memory = trace_memory(patched, x[:1])
        assert torch.equal(x, before)
        assert memory.peak == patched.plan(bytes_per=8).peak
        assert counted(patched, x) == 2 * patched.flops and patched.graph.flops == counted(model, x[:1])


def test_other_image_sizes_and_gradients():
    torch.manual_seed(0)
    model = settled(random_net(random.Random(3))).double()
    patched = patch_inference(model, torch.randn(1, 3, 24, 24, dtype=torch.float64), patches=(2, 3), split=2)
    x = torch.randn(3, 3, 31, 20, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(patched(x), model(x), rtol=1e-10, atol=1e-10)
    (mine,), (theirs,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (patched, model))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_zeros_between_tiles_would_be_wrong(mobile):
    """The check above can fail: tiles that are padded at inner borders give another output."""
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    x = torch.randn(1, 3, 12, 12)
    naive = torch.cat([model(part) for part in x.split(6, 2)], 2)
    assert (naive - model(x)).abs().max() > 0.05
    assert (patch_inference(model, x, patches=(2, 1), split=2)(x) - model(x)).abs().max() < 1e-6


def test_one_patch_is_the_plain_schedule():
    torch.manual_seed(0)
    model, x = settled(mobile_net(MobileConfig(8, (Block(1, 8), Block(4, 12, 2)), 16, 5))), torch.randn(2, 3, 16, 16)
    one = patch_inference(model, x, patches=(1, 1), split=2)
    assert one.overhead == 0
    with torch.no_grad():
        torch.testing.assert_close(one(x), patch_inference(model, x, split=0)(x), rtol=0, atol=0)


def test_auto_falls_back_where_the_output_buffer_dominates():
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 32, 3, padding=1), nn.Flatten()).eval()
    x = torch.randn(1, 3, 12, 12)
    tiled = patch_inference(narrow, x, patches=(2, 2), split=2)
    plain = patch_inference(narrow, x, patches=(2, 2))
    assert tiled.plan().peak > plan_memory(narrow, x).peak and plain.split == 0 and plain.plan().peak == plan_memory(narrow, x).peak


def test_search_meets_limits_with_the_least_extra_work():
    model, x = mobile_net(MobileConfig(16, (Block(1, 8), Block(6, 12, 2), Block(6, 16, 2)), 0, 5)).eval(), torch.randn(1, 3, 48, 48)
    layer, best = plan_memory(model, x).peak, search_schedule(model, x)
    assert best.peak < layer and best.overhead > 0
    roomy = search_schedule(model, x, limit_bytes=layer)
    assert roomy.split == 0 and roomy.overhead == 0
    between = search_schedule(model, x, limit_bytes=(layer + best.peak) // 2)
    assert between.peak <= (layer + best.peak) // 2 and between.overhead <= best.overhead
    patched = patch_inference(model, x, patches=between.patches, split=between.split, limit_bytes=between.peak)
    assert patched.plan().peak == between.peak and patched.overhead == pytest.approx(between.overhead)
    for split in ("auto", between.split):
        with pytest.raises(BadInput, match=r"cannot be met.*\d"):
            patch_inference(model, x, split=split, limit_bytes=10)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize(("middle", "name"), [(SqueezeExcite(), "2"), (nn.GroupNorm(2, 4), "2"), (nn.InstanceNorm2d(4), "2")])
def test_what_mixes_the_whole_map_is_refused_by_name(middle, name):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), middle, nn.Conv2d(4, 4, 3, 2)), torch.randn(1, 3, 16, 16)
    with pytest.raises(UnsupportedModel, match=name):
        patch_inference(model, x, split=3)
    behind = patch_inference(model, x, patches=(2, 2), split=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(behind(x), model.eval()(x))
        assert trace_memory(behind, x).peak <= behind.plan(bytes_per=4).peak


def test_training_is_the_plain_model():
    torch.manual_seed(0)
    model, x = mobile_net(MobileConfig(8, (Block(2, 8), Block(2, 8)), 0, 3)).train(), torch.randn(4, 3, 12, 12)
    patched = patch_inference(model, x, patches=(2, 2), split=2)
    assert patched.training
    twin = copy.deepcopy(model)
    torch.testing.assert_close(patched(x), twin(x), rtol=0, atol=0)
    assert torch.equal(patched.model[0][1].running_mean, twin[0][1].running_mean)


def test_a_transformer_is_tiled_up_to_its_patches_only():
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)

    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), Tokens(), nn.Sequential(block), nn.Flatten(), nn.Linear(16 * 16, 3)).eval()
    x = torch.randn(2, 3, 16, 16)
    patched = patch_inference(model, x, patches=(2, 2), split=1)
    torch.testing.assert_close(patched(x), model(x))
    with torch.no_grad():
        assert trace_memory(patched, x[:1]).peak <= patched.plan(bytes_per=4).peak
    with pytest.raises(UnsupportedModel):
        patch_inference(model, x, split=2)


def test_the_trace_knows_buffers_views_and_workspace():
    with BufferTrace() as memory:
        a = torch.zeros(100)
        a.add_(1)
        b = a[:50]
        with kernel():
            c = a * 2
            b.copy_(c[:50])
            del c
        d = torch.zeros(25)
        del a
    assert memory.peak == 500 and memory.scratch == 400 and memory.largest == 800 and memory.live == 500
    del b, d


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: patch_inference(m, x[:0]),
        lambda m, x: patch_inference(m, x * float("nan")),
        lambda m, x: patch_inference(m, x[:, :2]),
        lambda m, x: patch_inference(m, x[0]),
        lambda m, x: patch_inference(m, x, patches=(0, 2)),
        lambda m, x: patch_inference(m, x, patches=(50, 50), split=1),
        lambda m, x: patch_inference(m, x, split=99),
        lambda m, x: patch_inference(m, x, split="nowhere"),
        lambda m, x: patch_inference(m, x, split=0)(x[:, :2]),
        lambda m, x: plan_memory(m, x, bytes_per=0),
        lambda m, x: redistribute(MobileConfig(8, (Block(1, 8), Block(2, 8, 2)), 0), x, split=9),
    ],
)
def test_bad_input_is_refused(call):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.randn(1, 3, 16, 16)
    with pytest.raises(BadInput):
        call(model, x)


def test_inverted_residual_has_a_shortcut_only_where_the_shape_stays():
    assert InvertedResidual(8, Block(2, 8)).shortcut and not InvertedResidual(8, Block(2, 8, 2)).shortcut
    assert not InvertedResidual(8, Block(2, 12)).shortcut
    assert sum(p.numel() for p in mobile_net().parameters()) == 3_504_872  # the published network's
