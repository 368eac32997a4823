"""The engine: runs a staged network row by row as far as each row needs.

After stage k the gate scores each row that is still running; rows with score >= tau[k] leave with readout k, the state keeps the others.

*Modes.* ``compact`` selects the remaining rows out of every tensor of the state, so the work that is saved is really not done, and stops
when no row is left. ``masked`` runs everything, picks the same readouts afterwards and charges every row the full price; it has no
branches, so it exports as one graph. ``loop`` runs compact with one row at a time, the reference. All three are differentiable with
respect to what they output.

*Cost.* compact: what was run. A chunk keeps a stage's activations in cache; it changes speed, never a decision.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurarium.dynamic.gates import Gate
from neurarium.dynamic.outcome import Mode, Outcome, Staged
from neurarium.dynamic.tree import rows, take
from neurarium.errors import BadInput

__all__ = ["best_chunk", "dense", "pick", "run", "step"]


def run(staged: Staged, gate: Gate, tau: Tensor, x: Any, *, totals: Tensor, mode: Mode = "compact", chunk: int | None = None) -> Outcome:
    """Decide for a batch.

    Args:
        tau: ``(stages,)`` thresholds; the last is not used, every row that gets there leaves.
        totals: ``(stages,)`` int64 FLOPs of a row that leaves after stage k.
        chunk: rows at a time, all by default.

    The score of a row that reaches the last stage is 1: there is nothing left to ask.
    """
    n = rows(x)
    if n == 0:
        raise BadInput("an empty batch: pass at least one row")
    if len(tau) != staged.n_stages:
        raise BadInput(f"{staged.n_stages} stages need as many thresholds, not {len(tau)}")
    if mode == "masked":
        output, choice, score = pick(*dense(staged, gate, x), tau)
        return Outcome(output, totals[-1].expand(n).clone(), choice, score)
    if mode not in ("compact", "loop"):
        raise BadInput(f"mode must be 'compact', 'masked' or 'loop', not {mode!r}")
    size = 1 if mode == "loop" else chunk or n
    parts = [_compact(staged, gate, tau, take(x, c) if size < n else x) for c in torch.arange(n).split(size)]
    output, choice, score = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts))
    return Outcome(output, totals[choice], choice, score)


def step(staged: Staged, gate: Gate, k: int, state: Any, memory: Any) -> tuple[Any, Tensor, Tensor | None, Any]:
    """Stage k and its question: new state, readout, score (``None`` at the last stage), gate memory."""
    state, y = staged.stage(k, state)
    if k == staged.n_stages - 1:
        return state, y, None, memory
    score, memory = gate(k, y, memory)
    return state, y, score, memory


def _compact(staged: Staged, gate: Gate, tau: Tensor, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    state, memory, active = staged.start(x), None, None  # active: which rows the state holds; None is all, in order
    left: list[tuple[Tensor, ...]] = []  # (rows, outputs, choices, scores) that have left
    for k in range(staged.n_stages):
        state, y, score, memory = step(staged, gate, k, state, memory)
        n = len(y)
        leave = None if score is None else score >= tau[k]
        going = n if leave is None else int(leave.count_nonzero())
        if going == n:  # all that are left; nothing to sort if none left before
            score, choice = y.new_ones(n) if score is None else score, torch.full((n,), k, device=y.device)
            if active is None:
                return y, choice, score
            left.append((active, y, choice, score))
            break
        if going == 0:
            continue
        go, stay = leave.nonzero().squeeze(1), leave.logical_not().nonzero().squeeze(1)
        left.append((go if active is None else active[go], y[go], torch.full_like(go, k), score[go]))
        state, memory = take((state, memory), stay)
        active = stay if active is None else active[stay]
    where, output, choice, score = (torch.cat(p) for p in zip(*left))
    order = where.argsort()
    return output[order], choice[order], score[order]


def dense(staged: Staged, gate: Gate, x: Any) -> tuple[Tensor, Tensor]:
    """Every readout ``(n, stages, ...)`` and every score ``(n, stages - 1)``: nothing is skipped."""
    state, memory = staged.start(x), None
    ys: list[Tensor] = []
    scores: list[Tensor] = []
    for k in range(staged.n_stages):
        state, y, score, memory = step(staged, gate, k, state, memory)
        ys.append(y)
        if score is not None:
            scores.append(score)
    return torch.stack(ys, 1), torch.stack(scores, 1) if scores else ys[0].new_zeros(len(ys[0]), 0)


def pick(readouts: Tensor, scores: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, choice and score of the first stage whose score reaches its threshold."""
    choice = (scores < tau[:-1]).logical_or(scores.isnan()).long().cumprod(1).sum(1)
    index = choice.view(-1, 1, *[1] * (readouts.ndim - 2)).expand(-1, 1, *readouts.shape[2:])
    known = torch.cat([scores, torch.ones_like(readouts.flatten(1)[:, :1])], 1)
    return readouts.gather(1, index).squeeze(1), choice, known.gather(1, choice[:, None]).squeeze(1)


def best_chunk(policy: Any, x: Any, candidates: Sequence[int | None] = (16, 64, None), repeats: int = 3) -> int | None:
    """The chunk with which ``policy.decide(x)`` was fastest here; ``None`` is the whole batch. ``policy.chunk`` stays as it was."""
    before, seconds = policy.chunk, {}
    try:
        with torch.no_grad():
            policy.decide(x)
            for c in [c for _ in range(repeats) for c in candidates]:  # interleaved, so that a busy moment hits all
                policy.chunk, began = c, time.perf_counter()
                policy.decide(x)
                seconds[c] = min(seconds.get(c, float("inf")), time.perf_counter() - began)
    finally:
        policy.chunk = before
    return min(seconds, key=lambda c: seconds[c])
