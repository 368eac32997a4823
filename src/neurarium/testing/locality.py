"""Is a learning rule local? Three questions that any rule of :mod:`neurarium.learn.local` must answer yes to, and yours too."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from neurarium.learn.fit import device_of, to
from neurarium.learn.local import LocalLearner
from neurarium.meter import SavedBytes

__all__ = ["assert_local"]


def assert_local(learner: LocalLearner, model: nn.Module, batch: tuple[Tensor, Tensor], *, seed: int = 0) -> None:
    """Raise ``AssertionError`` unless ``learner`` trains each block of ``model`` without knowing the blocks above.

    1. Randomising every parameter above block i leaves the update of blocks 0 to i bit for bit as it was.
    2. No graph spans two blocks: the bytes that a fit keeps for the backward pass are at most 1.1 times what its largest block keeps alone.
    3. Every block that the rule says it trains does move.

    The model is not changed.
    """
    reference, names = _fitted(learner, model, batch, seed)
    start = dict(model.named_parameters())
    for i, unit in enumerate(names):
        still = [n for n in unit if torch.equal(reference[n], start[n])]
        assert not unit or len(still) < len(unit), f"block {i} did not learn: {still} are as they were"

    for j in range(1, len(names)):
        above = {n for unit in names[j:] for n in unit} - {n for unit in names[:j] for n in unit}
        if not above:
            continue
        other = deepcopy(model)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for n, p in other.named_parameters():
                if n in above:
                    p.copy_(torch.randn(p.shape, generator=generator).to(p))
        found, _ = _fitted(learner, other, batch, seed)
        for n in dict.fromkeys(n for unit in names[:j] for n in unit):
            assert torch.equal(found[n], reference[n]), f"the update of {n} (block < {j}) depends on the weights of blocks above it"

    kept, largest = _memory(learner, model, batch, seed)
    assert kept <= 1.1 * largest, (
        f"a step keeps {kept} bytes for the backward pass, the largest block alone {largest}: a graph spans blocks"
    )


def _fitted(learner: LocalLearner, model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Parameters after one batch, and the names of those that each block's loss trains."""
    trained = deepcopy(model)
    learner.fit(trained, [batch], epochs=1, seed=seed)
    objective = learner.trained(trained)
    names = {p: n for n, p in trained.named_parameters()}
    units = [[names[p] for p in objective.learned(i) if p in names] for i in range(len(objective.blocks))]
    return {n: p.detach() for p, n in names.items()}, units


def _memory(learner: LocalLearner, model: nn.Module, batch: tuple[Tensor, Tensor], seed: int) -> tuple[int, int]:
    """Bytes kept for the backward pass: peak over one fit, and of the largest block with its loss alone."""
    trained = deepcopy(model)
    with SavedBytes() as meter:
        learner.fit(trained, [batch], epochs=1, seed=seed)
    objective = learner.trained(trained)
    x, y = (to(t, device_of(model)) for t in batch)
    largest = 0
    with torch.no_grad():
        h = objective.enter(x, y)
    for i, block in enumerate(objective.blocks):
        with SavedBytes() as alone:
            h_in = h.clone()  # made inside, as a step's input is
            h_out = block(h_in)
            if objective.learned(i):
                loss = objective.loss(i, h_in, h_out, y)[0]
                largest = max(largest, alone.peak)
                del loss
        h = objective.between(h_out.detach())
    return meter.peak, largest
