"""A linear layer with adapters: peft's LoRA, this library's with one expert, and mixtures, sparse and dense.

    pytest benchmarks/dynamic/test_lora.py -s

With one expert the outputs are peft's to the last digits, checked before anything is timed. A mixture is compared with peft's LoRA of as
many weights. FLOPs are counted, a token; times are medians of forward passes over 2048 tokens, measured in turn on one thread.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neurarium.dynamic import DynMoLE
from neurarium.meter import flops, latency

TOKENS, WIDTH, RANK, EXPERTS = 2048, 512, 8, 8


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lora(base, rank):
    layers = pytest.importorskip("peft.tuners.lora.layer", exc_type=ImportError)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0)
    layer = layers.Linear(copy.deepcopy(base), "default", config=config, r=rank, lora_alpha=16)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.eval()


def mixture(base, sharpness, **options):
    """Experts whose router's logits have this standard deviation."""
    layer = DynMoLE(copy.deepcopy(base), **{"experts": EXPERTS, "rank": RANK, "dropout": 0.0, **options})
    nn.init.normal_(layer.up)
    if layer.router is not None:
        nn.init.normal_(layer.router, std=sharpness / WIDTH**0.5)
    return layer.eval()


def test_adapters():
    torch.manual_seed(0)
    base, x = nn.Linear(WIDTH, WIDTH), torch.randn(TOKENS, WIDTH)
    theirs, ours = lora(base, RANK), mixture(base, 0.0, experts=1)
    with torch.no_grad():
        ours.down[0], ours.up[0] = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    variants = {
        "linear": base,
        f"peft, rank {RANK}": theirs,
        f"one expert, rank {RANK}": ours,
        f"peft, rank {EXPERTS * RANK}": lora(base, EXPERTS * RANK),
        "all experts": mixture(base, 3.0, entropy_threshold=-float("inf")),
        "sure router, sparse": mixture(base, 3.0, dispatch="sparse"),
        "sure router, dense": mixture(base, 3.0, dispatch="dense"),
        "sure router, auto": mixture(base, 3.0),
        "16 of rank 64, sparse": mixture(base, 3.0, experts=16, rank=64, dispatch="sparse"),
        "16 of rank 64, dense": mixture(base, 3.0, experts=16, rank=64, dispatch="dense"),
        "16 of rank 64, auto": mixture(base, 3.0, experts=16, rank=64),
    }
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        for size in ("sure router", "16 of rank 64"):
            sparse = variants[f"{size}, sparse"]
            for how in ("dense", "auto"):
                other = variants[f"{size}, {how}"]
                other.load_state_dict(sparse.state_dict())
                torch.testing.assert_close(sparse(x), other(x), rtol=1e-3, atol=1e-3)
        counted = {name: flops(layer, x) / TOKENS for name, layer in variants.items()}
        found = latency({name: (lambda layer=layer: layer(x)) for name, layer in variants.items()}, repeats=15)
    print()
    for name, layer in variants.items():
        active = f"{layer.last_active.double().mean():5.2f} experts" if isinstance(layer, DynMoLE) else ""
        print(f"{name:>22}: {counted[name] / 1e3:7.1f} kFLOPs a token, {1e6 * found[name].median / TOKENS:6.2f} us a token {active}")
    assert counted[f"one expert, rank {RANK}"] == counted[f"peft, rank {RANK}"]
    for name in [name for name, layer in variants.items() if isinstance(layer, DynMoLE)]:
        assert counted[name] * TOKENS == int(variants[name].last_cost.sum())
    assert counted["sure router, sparse"] < counted[f"peft, rank {EXPERTS * RANK}"]
    for size in ("sure router", "16 of rank 64"):
        best = min(found[f"{size}, {how}"].median for how in ("sparse", "dense"))
        assert found[f"{size}, auto"].median < 1.2 * best
    assert found[f"one expert, rank {RANK}"].median < 1.3 * found[f"peft, rank {RANK}"].median
