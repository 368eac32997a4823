"""Whole blocks go, by the right score; what the runtime makes of them computes the same; nothing is decided that cannot be carried out."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress import Block, SparseLinear, Tiles, block_prune, explicit, finalise, plan_block_prune, to_sparse_runtime
from neurarium.compress.runtime import build
from neurarium.errors import BadInput, UnsupportedModel


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 19), nn.ReLU(), nn.Linear(19, 5))


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1), (4, 4), (3, 5)])
def test_the_weakest_blocks_go_and_no_others(block: tuple[int, int]) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    plan = plan_block_prune(model, block=block, sparsity=0.6)
    for name, mask in plan.masks.items():
        weight = model.get_submodule(name).weight.detach()
        assert plan.pattern.holds(mask)
        kept, gone = [], []
        for i in range(0, weight.shape[0], block[0]):
            for j in range(0, weight.shape[1], block[1]):
                part = mask[i : i + block[0], j : j + block[1]]
                (kept if part.all() else gone).append(weight[i : i + block[0], j : j + block[1]].abs().sum().item())
        assert len(gone) == round(0.6 * (len(kept) + len(gone)))
        assert max(gone) <= min(kept) + 1e-6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_where_the_sides_fit_it_is_the_plain_block_pattern() -> None:
    score = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    for out, into in ((4, 1), (8, 4), (1, 1)):
        assert torch.equal(Tiles(out, into).mask(score, 0.7), Block(out, into).mask(score, 0.7))
    odd = torch.ones(5, 3, dtype=torch.bool)
    odd[4] = False
    assert Tiles(4, 1).holds(odd)
    odd[0, 0] = False
    assert not Tiles(4, 1).holds(odd)
    kernels = Tiles(4, 9).mask(torch.rand(8, 3, 3, 3), 0.5)  # a unit is four outputs, one input, all taps
    assert kernels.shape == (8, 3, 3, 3)
    assert ((kernels.sum((2, 3)) == 0) | (kernels.sum((2, 3)) == 9)).all()


def test_taylor_scores_are_the_change_of_each_samples_loss() -> None:
    """Of a linear model with a linear loss the first-order change is the whole change: brute force, block by block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    x, y = torch.randn(10, 6), torch.randn(10, 8)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * target).sum()

    harm = torch.zeros(2, 6)
    for i in range(2):
        for j in range(6):
            without = copy.deepcopy(model)
            without[0].weight.data[4 * i : 4 * i + 4, j] = 0
            harm[i, j] = torch.stack([(loss(without(a), b) - loss(model(a), b)).abs() for a, b in zip(x, y)]).mean()
    plan = plan_block_prune(model, sparsity=0.5, score="taylor", loader=[(x, y)], loss_fn=loss)
    kept = plan.masks["0"][::4]
    assert kept.sum() == 6
    assert harm[kept].min() > harm[~kept].max()
    plain = plan_block_prune(model, sparsity=0.5)
    assert not torch.equal(plain.masks["0"], plan.masks["0"])


def test_a_loud_input_that_nothing_needs_goes_by_loss_and_stays_by_magnitude() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[:, 0] = 3.0
    x = torch.randn(32, 8)
    x[:, 0] = 0
    loader = [(x, torch.randint(0, 8, (32,)))]
    assert plan_block_prune(model, sparsity=0.5).masks["0"][:, 0].all()
    assert not plan_block_prune(model, sparsity=0.5, score="taylor", loader=loader).masks["0"][:, 0].any()


def test_pruned_trained_and_run_sparse_it_is_one_function() -> None:
    model = network()
    masked = block_prune(model, block=(16, 1), sparsity=0.75)
    assert masked.plan.masks["0"].float().mean() == 0.25
    x, y = torch.randn(64, 12), torch.randint(0, 5, (64,))
    optimizer = torch.optim.Adam(masked.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        losses.append(F.cross_entropy(masked(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    runs = to_sparse_runtime(masked, planner="always", block=(16, 1), min_sparsity=0.3, example=x)
    assert sum(isinstance(m, SparseLinear) for m in runs.modules()) == len(masked.plan.masks)
    torch.testing.assert_close(runs(x), finalise(masked)(x), atol=1e-5, rtol=1e-5)
    again = block_prune(masked, block=(16, 1), sparsity=0.75)  # the same blocks: what is gone has no score
    assert all(torch.equal(again.plan.masks[n], m) for n, m in masked.plan.masks.items())


def test_bad_requests() -> None:
    model = network()
    data = [(torch.randn(4, 12), torch.randint(0, 5, (4,)))]
    for options, match in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"block": (0, 1)}, "at least 1"),
        ({"score": "wanda"}, "score"),
        ({"score": "taylor"}, "loader"),
        ({"score": "taylor", "loader": []}, "empty"),
        ({"score": "taylor", "loader": [(data[0][0] * torch.nan, data[0][1])]}, "not finite"),
        ({"skip": ("9",)}, "'9'"),
    ):
        with pytest.raises(BadInput, match=match):
            block_prune(model, **options)
    few = plan_block_prune(model, block=(32, 4), sparsity=0.8)
    assert few.skipped == {"4": "80% of its 5 block(s) of 32 x 4 would be all"} or "4" not in few.masks or few.masks["4"].any()
    assert all(m.any() for m in few.masks.values())
    with pytest.raises(UnsupportedModel, match="would be all"):
        block_prune(nn.Sequential(nn.Linear(4, 4)), block=(16, 4), sparsity=0.8)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="0: the weight"):
        block_prune(model)


def test_without_a_compiler_a_model_still_runs(tmp_path) -> None:
    """In a process of its own, with an empty cache: one warning, the same numbers."""
    code = """
import torch, warnings
from torch import nn
from neurarium.compress import block_prune, finalise, to_sparse_runtime
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
masked = block_prune(model, sparsity=0.75)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    runs = to_sparse_runtime(masked, planner="always", min_sparsity=0.5)
    x = torch.randn(5, 24)
    torch.testing.assert_close(runs(x), finalise(masked)(x), atol=1e-5, rtol=1e-5)
said = [str(w.message) for w in heard if "sparse products run in torch" in str(w.message)]
assert len(said) == 1 and "no C++ compiler" in said[0], said
print("fine")
"""
    env = {**os.environ, "CXX": "/nonexistent", "NEURARIUM_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_explicit_attention_is_pruned_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert set(plan_block_prune(explicit(model)).masks) == {f"self_attn.{n}" for n in ("q", "k", "v", "out")} | {"linear1", "linear2"}


def test_the_kernels_sources_travel_with_the_package() -> None:
    pytest.importorskip("hatchling")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parents[2]
    needed = {f"src/neurarium/compress/runtime/{name}" for name in (*build.SOURCES, *build.HEADERS)}
    for kind in (WheelBuilder, SdistBuilder):
        assert needed <= {Path(f.path).relative_to(root).as_posix() for f in kind(str(root)).recurse_included_files()}
    assert {p.name for p in (root / "src/neurarium/compress/runtime").iterdir() if p.suffix in (".cpp", ".h")} == {
        *build.SOURCES, *build.HEADERS
    }  # fmt: skip
