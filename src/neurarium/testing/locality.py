"""Is a learning rule local? Questions that any rule of :mod:`neurarium.learn.local` must answer yes to, and yours too.

:func:`assert_local` is for rules whose blocks hear nothing from above, :func:`assert_feedback_local` for rules whose blocks hear a signal
from the top that must not come through the forward weights between."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from neurarium.learn.chain import as_chain
from neurarium.learn.fit import Learner, device_of, to
from neurarium.learn.local import LocalLearner
from neurarium.meter import SavedBytes

__all__ = ["assert_feedback_local", "assert_local"]


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


def assert_feedback_local(
    learner: Learner,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    blocks: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> None:
    """Raise ``AssertionError`` unless the signal that teaches each block passes by the forward weights of the blocks above it.

    Randomising every parameter above a block must leave its update bit for bit as it was. The output error would change with those
    weights, so a learner that has a ``loss`` setting is given one whose error is the same whatever the output is.

    Args:
        blocks: names of the parameters of each block from the input up; those of :func:`~neurarium.learn.chain.as_chain` by default.

    The model is not changed.
    """
    if blocks is None:
        chain = as_chain(model, to(batch[0], device_of(model)))
        names = {p: n for n, p in model.named_parameters()}
        blocks = [[names[p] for p in block.parameters()] for block in chain.blocks]

    def fixed_error(output: Tensor, y: Tensor) -> Tensor:
        del y
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 2)).to(output)
        return (output * weights).sum() / len(output)

    if any(f.name == "loss" for f in fields(learner)):  # type: ignore[arg-type]
        learner = replace(learner, loss=fixed_error)  # type: ignore[type-var]

    def updated(above: Sequence[str]) -> dict[str, Tensor]:
        trained = deepcopy(model)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for n, p in trained.named_parameters():
                if n in above:
                    p.copy_(torch.randn(p.shape, generator=generator).to(p))
        learner.fit(trained, [batch], epochs=1, seed=seed)
        return dict(trained.named_parameters())

    reference, start = updated(()), dict(model.named_parameters())
    for i, unit in enumerate(blocks):
        learned = [n for n in unit if start[n].requires_grad]
        assert not learned or any(not torch.equal(reference[n], start[n]) for n in learned), f"block {i} did not learn"
    for j in range(1, len(blocks)):
        above = {n for unit in blocks[j:] for n in unit}
        found = updated(sorted(above))
        for n in (n for unit in blocks[:j] for n in unit if n not in above):
            assert torch.equal(found[n], reference[n]), f"the update of {n} (block < {j}) depends on the forward weights of blocks above it"


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
            h_in, y = h.clone(), y.clone()  # made inside, as a step's input is
            h_out = block(h_in)
            if objective.learned(i):
                loss = objective.loss(i, h_in, h_out, y)[0]
                largest = max(largest, alone.peak)
                del loss
        h = objective.between(h_out.detach())
    return meter.peak, largest
