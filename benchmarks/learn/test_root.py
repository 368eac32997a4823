"""One optimizer step: ROOT and Muon of this library beside torch.optim.Muon, on few large and on many small matrices.

    pytest benchmarks/learn -s

Same matrices, gradients and settings, one thread, the steps measured in turn. Torch iterates in bfloat16, so ours is measured in bfloat16
(that one update agrees is checked before anything is timed) and in float32, its default on processors.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from neurarium.learn.orthogonal import ROOT, Muon
from neurarium.meter import latency

CASES = {"3 of 256x1024": [(256, 1024)] * 3, "32 of 64x64": [(64, 64)] * 32, "64 of 32x32": [(32, 32)] * 64, "1 of 512x512": [(512, 512)]}
BF16 = {"lr": 1e-2, "ns_dtype": torch.bfloat16}
MAKE = {
    "torch": partial(torch.optim.Muon, lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    "muon": partial(Muon, **BF16),
    "root": partial(ROOT, **BF16),
    "muon in float32": partial(Muon, lr=1e-2),
    "root in float32": partial(ROOT, lr=1e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_step(case):
    torch.set_num_threads(1)
    params, steps = {}, {}
    for name, make in MAKE.items():
        torch.manual_seed(0)
        params[name] = [nn.Parameter(torch.zeros(shape)) for shape in CASES[case]]
        for p in params[name]:
            p.grad = torch.randn_like(p)
        optimizer = make(params[name])
        optimizer.step()
        steps[name] = optimizer.step
    for ours, theirs in zip(params["muon"], params["torch"], strict=True):
        assert torch.nn.functional.cosine_similarity(ours.detach().flatten(), theirs.detach().flatten(), 0) > 0.99
    found = latency(steps, repeats=20)
    print(f"\n{case:>14}: " + ", ".join(f"{name} {1e3 * t.median:.2f} ms" for name, t in found.items()))
    print(f"{'':>16}to torch: " + ", ".join(f"{name} {t.median / found['torch'].median:.2f}" for name, t in found.items()))
    many = len(CASES[case]) > 10  # where stacking pays; a few large matrices cost what torch's do, plus the cut
    assert found["muon"].low <= (0.5 if many else 1.3) * found["torch"].low
    assert found["root"].low <= (0.8 if many else 1.6) * found["torch"].low


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_the_update_is_torchs(shape, monkeypatch):
    """Three steps on one matrix; torch's iteration is made to run in float32 as well, so that only the rule is compared."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    found = []
    for make in (partial(Muon, lr=1e-2), partial(torch.optim.Muon, lr=1e-2, adjust_lr_fn="match_rms_adamw")):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape))
        optimizer = make([p])
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        found.append(p.detach())
    distance = float((found[0] - found[1]).abs().max())
    print(f"\n{shape}: furthest from torch's after three steps {distance:.1e}")
    assert distance < 2e-6
