"""FLAP's score is the error that it makes, and its bias is the mean that it takes away."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neurarium.compress import GPT, FlapPlan, TransformerBlocks, apply_flap, calibrate, explicit, flap, magnitude_sp, plan_flap, wanda_sp
from neurarium.compress.prune.flap import METRICS, STRUCTURES, column_scores
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import parameters
from neurarium.testing.architectures import subject


def gpt() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = GPT(30, width=24, heads=4, layers=2, hidden=40, context=16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval(), [torch.randint(0, 30, (n, 12)) for n in (5, 3, 8)]


def with_means(model: nn.Module, loader: Iterable, gone: dict[str, Tensor], x: Tensor) -> Tensor:
    """The dense model whose readers see the calibration mean in the given input columns."""
    stats = calibrate(model, loader, modules=list(gone))
    handles = []
    for name, columns in gone.items():

        def hook(_: nn.Module, args: tuple, columns: Tensor = columns, mean: Tensor = stats[name].mean) -> tuple:
            z = args[0].clone()
            shape = [1, -1] + [1] * (z.ndim - 2) if z.ndim == 4 else [-1]
            index = (slice(None), columns) if z.ndim == 4 else (..., columns)
            z[index] = mean[columns].to(z).view(shape)
            return (z, *args[1:])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        y = model(x)
    for handle in handles:
        handle.remove()
    return getattr(y, "logits", y)


@pytest.mark.parametrize("name", ["gpt", "llama", "opt", "gpt2", "torch"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_smaller_model_is_the_dense_one_with_means_in_place(name: str, structure: str) -> None:
    if name == "torch":
        torch.manual_seed(0)
        model: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2).eval()
        loader, x = [torch.randn(4, 7, 32) + 0.5], torch.randn(3, 5, 32)
    elif name == "gpt":
        model, loader = gpt()
        x = loader[1]
    else:
        pytest.importorskip("transformers")
        case = subject(name)
        model, loader, x = case.model, case.loader, case.inputs[0]
    before = copy.deepcopy(model.state_dict())
    small = flap(model, loader, ratio=0.4, structure=structure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    opened = explicit(model)
    gone: dict[str, Tensor] = {}
    for block in TransformerBlocks.of(opened):
        for kind in ("heads", "ffn"):
            key = f"{block.name}.{kind}".lstrip(".")
            left = torch.tensor([u for u in range(small.plan.sizes[key]) if u not in small.plan.kept[key]], dtype=torch.long)
            if len(left):
                view, columns = block.readers(kind, left)
                gone[view.name] = columns
    assert gone
    with torch.no_grad():
        found = small(x)
    torch.testing.assert_close(getattr(found, "logits", found), with_means(opened, loader, gone, x), rtol=1e-4, atol=1e-4)
    assert small.plan.parameters_after == parameters(small) < parameters(model) == small.plan.parameters_before
    if hasattr(small, "generate") and name != "gpt":
        assert small.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 6
    again = apply_flap(model, FlapPlan.from_json(small.plan.to_json()))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("architecture", ["mlp", "resnet", "mobilenet", "densenet"])
def test_channels_of_other_networks(architecture: str) -> None:
    """Convolutions that read without padding and linear layers see the mean exactly."""
    case = subject(architecture)
    small = flap(case.model, case.loader, ratio=0.4)
    assert small.plan.parameters_after == parameters(small) < parameters(case.model)
    bare = flap(case.model, case.loader, ratio=0.4, bias=False)
    assert case.run(small).shape == case.run().shape
    dense, with_bias, without = case.run(), case.run(small), case.run(bare)
    assert (with_bias - dense).square().mean() < (without - dense).square().mean()
    if architecture == "mlp":
        gone = {}
        for reader, group in (("3", "1"), ("5", "3")):
            columns = [u for u in range(small.plan.sizes[group]) if u not in small.plan.kept[group]]
            gone[reader] = torch.tensor(columns, dtype=torch.long)
        torch.testing.assert_close(with_bias, with_means(case.model, case.loader, gone, case.inputs[0]), rtol=1e-4, atol=1e-5)


def test_constant_channels_go_without_a_trace() -> None:
    model, loader = gpt()
    still = [1, 7, 20, 33]
    with torch.no_grad():
        for block in model.blocks:
            block.up.bias += 1.5  # no other unit is silent on all tokens
            block.up.weight[still] = 0.0
            block.up.bias[still] = torch.tensor([1.0, -1.0, 0.5, 2.0])
    plan = plan_flap(model, loader, ratio=0.1, structure="UL-UM", protect=["blocks.0.heads", "blocks.1.heads"])
    for key in ("blocks.0.ffn", "blocks.1.ffn"):
        assert set(range(40)) - set(plan.kept[key]) == set(still)
    with torch.no_grad():
        torch.testing.assert_close(apply_flap(model, plan)(loader[0]), model(loader[0]), rtol=1e-5, atol=1e-5)
    stats = calibrate(model, loader, modules=["blocks.0.down"])["blocks.0.down"]
    score = column_scores(model.blocks[0].down.weight.detach(), stats)
    assert float(score[still].max()) < 1e-12 < float(score.max())
    # a convolutional network: constants survive the normalisation and the activation
    torch.manual_seed(1)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(),
                         nn.Flatten(), nn.Linear(144, 3)).eval()  # fmt: skip
    with torch.no_grad():
        conv[1].weight[:3], conv[1].bias[:3] = 0.0, torch.tensor([1.0, 2.0, -1.0])
    x = torch.randn(12, 3, 8, 8)
    small = flap(conv, [x], ratio=0.375, structure="UL-UM", protect=["3"])
    assert small.plan.kept["0"] == (3, 4, 5, 6, 7)
    torch.testing.assert_close(small(x), conv(x), rtol=1e-5, atol=1e-5)
    assert conv[3].bias is None
    assert small[3].bias is not None


@pytest.mark.parametrize("mixed", [True, False])
def test_the_error_is_the_variance_that_is_lost(mixed: bool) -> None:
    """E ||W_gone (x - mean)||^2 = trace(W_gone C W_gone^T); without correlations, the sum of the scores."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 10, generator=g, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0))[0] * torch.linspace(10, 90, 10)
    x = (x @ torch.randn(10, 10, generator=g, dtype=torch.float64) if mixed else x) + torch.linspace(-1, 1, 10)
    layer = nn.Linear(10, 5).double()
    stats = calibrate(layer, x.split(700), gram=True)[""]
    weight, gone = layer.weight.detach(), torch.tensor([0, 4, 5, 8])
    bias = layer.bias.detach() + weight[:, gone] @ stats.mean[gone]
    kept = torch.tensor([j for j in range(10) if j not in gone.tolist()])
    error = (layer(x).detach() - x[:, kept] @ weight[:, kept].T - bias).square().sum(1).mean()
    part = weight[:, gone]
    torch.testing.assert_close(error, (part @ stats.covariance[gone][:, gone] @ part.T).trace())
    by_scores = column_scores(weight, stats)[gone].sum() * (4000 - 1) / 4000
    assert bool(torch.isclose(error, by_scores)) is not mixed


def test_statistics_count_every_token_alike() -> None:
    model, loader = gpt()
    rows: list[Tensor] = []
    handle = model.blocks[1].down.register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for x in loader:
            model(x)
    handle.remove()
    seen = torch.cat(rows).double().numpy()
    stats = calibrate(model, loader, modules=["blocks.1.down"])["blocks.1.down"]
    np.testing.assert_allclose(stats.variance, seen.var(0, ddof=1), rtol=1e-6)
    weight = model.blocks[1].down.weight.detach().double().numpy()
    expected = {
        "WIFV": seen.var(0, ddof=1) * (weight**2).sum(0), "IFV": seen.var(0, ddof=1),
        "WIFN": np.abs(weight).mean(0) * np.sqrt((seen**2).mean(0)), "magnitude": np.sqrt((weight**2).sum(0)),
    }  # fmt: skip
    for metric in METRICS:
        np.testing.assert_allclose(column_scores(model.blocks[1].down.weight, stats, metric).detach(), expected[metric], rtol=1e-5)


def test_who_competes_with_whom() -> None:
    model, loader = gpt()
    plans = {s: plan_flap(model, loader, ratio=0.35, structure=s) for s in STRUCTURES}
    price = TransformerBlocks.of(model).unit_parameters()
    total = sum(n * price[k] for k, n in plans["AL-AM"].sizes.items())
    left = {s: sum(len(u) * price[k] for k, u in p.kept.items()) for s, p in plans.items()}
    assert 0 <= 0.65 * total - left["AL-AM"] <= max(price.values())
    assert all(len(u) == round(0.65 * plans["UL-UM"].sizes[k]) for k, u in plans["UL-UM"].kept.items())
    # by hand: the largest scores of all units while they fit
    ranked = sorted(((s, k, u) for k, scores in plans["AL-AM"].scores.items() for u, s in enumerate(scores)), reverse=True)
    spent, best = 0, {k: set() for k in price}
    for _, key, unit in ranked:
        if spent + price[key] > 0.65 * total:
            break
        spent += price[key]
        best[key].add(unit)
    assert all(best[k] <= set(plans["AL-AM"].kept[k]) for k in price)
    heads = plan_flap(model, loader, ratio=0.35, structure="UL-MM", heads=0.0)
    assert all(len(heads.kept[f"blocks.{i}.heads"]) == 4 for i in range(2))
    removed = sum((n - len(heads.kept[k])) * price[k] for k, n in heads.sizes.items())
    assert abs(removed - 0.35 * total) <= 2 * price["blocks.0.ffn"]
    cheap = plan_flap(model, loader, ratio=0.35, head_cost=1e-6)
    assert sum(len(u) for k, u in cheap.kept.items() if k.endswith("ffn")) in (51, 52)
    z = torch.tensor(plans["AL-AM"].scores["blocks.0.ffn"])
    torch.testing.assert_close(torch.stack([z.mean(), z.std()]), torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-5)


def test_nothing_removed_is_the_same_function_and_the_baselines_have_the_same_sizes() -> None:
    model, loader = gpt()
    for structure in STRUCTURES:
        assert torch.equal(flap(model, loader, ratio=0.0, structure=structure)(loader[0]), model(loader[0]))
    sizes = {parameters(f(model, loader, ratio=0.3)) for f in (wanda_sp, magnitude_sp)} | {
        parameters(flap(model, loader, ratio=0.3, structure="UL-UM"))
    }
    assert len(sizes) == 1


def test_what_cannot_be_done_is_said() -> None:
    model, loader = gpt()
    with pytest.raises(BadInput, match="empty"):
        flap(model, [])
    with pytest.raises(BadInput, match=r"blocks\.0\.heads: would lose all of its 4 units"):
        flap(model, loader, ratio=0.9, structure="UL-UM")
    with pytest.raises(BadInput, match="the least that must stay"):
        flap(model, loader, ratio=0.99)
    with pytest.raises(BadInput, match="protect names 'head'"):
        flap(model, loader, protect=["head"])
    with pytest.raises(BadInput, match="feed-forward units would have to lose"):
        flap(model, loader, ratio=0.2, structure="UL-MM", heads=0.9)
    with pytest.raises(BadInput, match="metric is one of"):
        flap(model, loader, metric="L1")
    case = subject("vgg")
    with pytest.raises(BadInput, match="finite"):
        flap(case.model, [(torch.full_like(x, torch.nan), y) for x, y in case.loader])
    with pytest.raises(UnsupportedModel, match="Embedding"):
        flap(nn.Embedding(9, 4), [torch.zeros(2, 3, dtype=torch.long)])
