"""Sorted fine-tuning (SoFT): every depth of a decoder learns to answer, through the one norm and head that the model already has.

Fine-tuned as usual, a language model can be read only after its last layer. Sorted fine-tuning trains a few depths at once: the hidden
state after n layers goes through the *same* final norm and head, and all of them are asked for the target. The prefixes become usable
models of their own, nothing is added to what is stored, and one pass through the full depth gives all the losses, so that a step costs
hardly more than before. Afterwards one may cut the model, pick a depth by budget, or let each token stop where it is sure.

*Equations.* h_n the hidden state after n layers, B the set of depths:

- *sub-model*: f_n(x) = Head(Norm(h_n));
- *loss*: 1/|B| sum_{n in B} CE(f_n(x), y) over the tokens of the response (y = -100 elsewhere);
- *exit of a token*: the first n in B with max softmax f_n >= tau_n (:class:`~neurarium.dynamic.gates.MaxProb`, or any other gate);
- *keys and values of the layers that a token skipped*: K_l = W_K Norm_l(h_n), V_l = W_V Norm_l(h_n) for l > n, made of the hidden state
  that it left with, because later tokens that go deeper attend to them.

``decide(ids)`` treats a row of tokens as one input and answers with the logits of the token after it, so gates, budgets, costs and
:func:`split` are those of any early exit. :meth:`SortedFineTuning.generate` goes on token by token with a cache. A classifier whose blocks
have one shape (a vision transformer) is trained the same way; its readout is norm, pool and head.

*Source.* Valipour, Rezagholizadeh, Rajabzadeh, Kavehzadeh, Tahaei, Chen and Ghodsi, "Sorted LLaMA: Unlocking the Potential of Intermediate
Layers of Large Language Models for Dynamic Inference Using Sorted Fine-Tuning (SoFT)", arXiv 2309.08968.

*Departures.* The prompt is read at full depth (or at the fixed depth asked for) before tokens leave early, so that only generated tokens
have filled keys; the paper leaves that open. ``accumulate`` (train some of the depths at a step) and ``shared_head=False`` (the ablation:
a norm and head of its own for each depth) are ours.

*Cost.* A step: one forward and backward at full depth and |B| heads instead of one. Storage: none. A token: the layers up to its exit, the
heads on the way, two projections for each layer that it skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.budget import Curve
from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.gates import Gate
from neurarium.dynamic.outcome import Mode, Outcome
from neurarium.dynamic.parts import KeyValues, Parts, take_apart
from neurarium.dynamic.staged import pick
from neurarium.dynamic.tree import parameter_shapes, take
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import check_labels
from neurarium.roles import Loader

__all__ = ["Depths", "Generation", "SortedFineTuning"]


class Depths(nn.Module):
    """A model as stages that end at ``depths``; readout k is norm and head on what the first ``depths[k]`` layers give.

    Of a language model only the last position is read out, ``(n, vocabulary)``.
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], *, shared_head: bool = True) -> None:
        super().__init__()
        parts = take_apart(model)
        depths, most = tuple(depths), len(parts.layers)
        if not depths or list(depths) != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= most:
            raise BadInput(f"depths must rise from at least 1 to at most the model's {most} layers, not {depths}")
        self.model, self.parts, self.depths = model, parts, depths
        own = [] if shared_head else [nn.Sequential(*copy.deepcopy(parts.tail)) for _ in depths[:-1]]
        self.own = nn.ModuleList(own)  # heads of the early depths; the last one keeps the model's

    @property
    def n_stages(self) -> int:
        return len(self.depths)

    def span(self, k: int) -> range:
        """The layers of stage k."""
        return range(self.depths[k - 1] if k else 0, self.depths[k])

    def start(self, x: Tensor) -> Tensor:
        return self.parts.embed(x)

    def stage(self, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.parts.run(state, self.span(k))
        return state, self.last(k, state)

    def last(self, k: int, h: Tensor) -> Tensor:
        """Readout k of the last position (of the whole input, if the model is no language model): ``(n, classes)``."""
        return self.read(k, h[:, -1:]).squeeze(1) if self.parts.text else self.read(k, h)

    def read(self, k: int, h: Tensor) -> Tensor:
        """Readout k of every position."""
        for module in self.own[k] if k < len(self.own) else self.parts.tail:
            h = module(h)
        return h


@dataclass(frozen=True)
class Generation:
    """What :meth:`SortedFineTuning.generate` wrote.

    Attributes:
        tokens: ``(n, time + new)`` the prompt and the new tokens.
        depth: ``(n, new)`` layers that made each new token.
        cost: ``(n,)`` int64 FLOPs of each row: the prompt, the layers and heads that ran, the keys and values that were filled.
    """

    tokens: Tensor
    depth: Tensor
    cost: Tensor


class SortedFineTuning(EarlyExit):
    """Sorted fine-tuning of ``decoder``, in place, and its use at any of the trained depths.

    Args:
        decoder: :class:`~neurarium.dynamic.decoder.Decoder`, a causal language model of ``transformers`` (Llama, GPT-2, OPT and what is
            built like them), or an ``nn.Sequential`` with ``blocks``, see :func:`~neurarium.dynamic.parts.take_apart`.
        depths: B, rising numbers of layers; the last one is what counts as the whole model.
        shared_head: one norm and head for all depths; otherwise each early depth gets a copy of its own.
        accumulate: how many depths of B, drawn anew at each step, a loss is over; all of them by default.
        gate, threshold: when a row may stop, as in :class:`~neurarium.dynamic.exits.EarlyExit`.

    Input rows have one length. ``loss(ids, y)``: y ``(n, time)`` next tokens, -100 where nothing is to be learned, or ``(n,)`` the token
    after the last.
    """

    def __init__(
        self,
        decoder: nn.Module,
        depths: Sequence[int],
        *,
        shared_head: bool = True,
        accumulate: int | None = None,
        gate: Gate | None = None,
        threshold: float = 0.9,
    ) -> None:
        super().__init__(Depths(decoder, depths, shared_head=shared_head), gate, threshold=threshold)
        if accumulate is not None and not 1 <= accumulate <= len(self.depths):
            raise BadInput(f"accumulate must be from 1 to the number of depths ({len(self.depths)}), not {accumulate}")
        self.accumulate = accumulate

    @property
    def depths(self) -> tuple[int, ...]:
        return self.staged.depths

    @property
    def parts(self) -> Parts:
        return self.staged.parts

    def decide(self, x: Any, *, budget: float | None = None, threshold: float | None = None, mode: Mode = "compact") -> Outcome:
        self._check(x)
        return super().decide(x, budget=budget, threshold=threshold, mode=mode)

    def sampled(self, step: int) -> list[int]:
        """The depths, as indices in B, that the loss of ``step`` is over."""
        if self.accumulate is None:
            return list(range(len(self.depths)))
        order = torch.randperm(len(self.depths), generator=torch.Generator().manual_seed(step))
        return sorted(order[: self.accumulate].tolist())

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        self._check(x)
        chosen, terms = self.sampled(step), []
        h = self.staged.start(x)
        for k in range(chosen[-1] + 1):
            h = self.parts.run(h, self.staged.span(k))
            if k in chosen:
                every = self.parts.text and y.ndim == 2
                out, target = (self.staged.read(k, h).flatten(0, 1), y.flatten()) if every else (self.staged.last(k, h), y)
                if not terms:
                    self._check_target(out, target)
                terms.append(F.cross_entropy(out, target))
        return torch.stack(terms).mean()

    def calibrate(self, loader: Loader, *, grid: int = 64) -> Curve:
        """As :meth:`EarlyExit.calibrate`; of targets ``(n, time)`` the last position counts."""
        return super().calibrate([(x, y[:, -1] if y.ndim == 2 else y) for x, y in loader], grid=grid)

    def extract(self, depth: int) -> nn.Module:
        """A copy of the model with the first ``depth`` layers alone, of the same class."""
        k = self._index(depth)
        model = self.parts.shortened(depth)
        if k < len(self.staged.own):
            type(self.parts)(model).replace_tail(list(copy.deepcopy(self.staged.own[k])))
        return model

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        depth: int | None = None,
        budget: float | None = None,
        threshold: float | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Continue each row of ``prompt`` ``(n, time)``, with a cache of keys and values.

        Args:
            depth: every token by the sub-model of that depth.
            budget: the thresholds that ``decide(prompt, budget=...)`` would use, for every token.
            threshold: every token stops at the first depth that is as sure as this; 2 is never.
            temperature: 0 takes the likeliest token, otherwise tokens are drawn (``generator``).

        Without ``depth``, ``budget`` and ``threshold`` the current thresholds decide.
        """
        if not self.parts.text:
            raise UnsupportedModel("is no language model: it has nothing to generate", module=type(self.staged.model).__name__)
        if depth is not None and (budget is not None or threshold is not None):
            raise BadInput("give a depth, a budget or a threshold, not several")
        if max_new_tokens < 1 or temperature < 0:
            raise BadInput(f"need at least one new token and a temperature of at least 0, not {max_new_tokens} and {temperature}")
        self._check(prompt)
        n, time = prompt.shape
        if n == 0:
            raise BadInput("an empty batch: pass at least one row")
        length = time + max_new_tokens - 1  # the last token is not read
        if self.parts.context is not None and length > self.parts.context:
            raise BadInput(f"{time} tokens and {max_new_tokens} new ones do not fit the model's context of {self.parts.context}")
        fixed = None if depth is None else self._index(depth)
        tau = self.setting(prompt, budget=budget, threshold=threshold)
        prices = self._prices(time, length)
        tokens, depths, cost, cache = [prompt], [], prompt.new_zeros(n), KeyValues(n, length)
        with evaluating(self):
            for i in range(max_new_tokens):
                y, choice = self._next(tokens[-1], tau, fixed, cache)
                tokens.append(_draw(y, temperature, generator))
                depths.append(torch.tensor(self.depths, device=prompt.device)[choice])
                cost += prices.of(i, choice, alone=fixed is not None)
        return Generation(torch.cat(tokens, 1), torch.stack(depths, 1), cost)

    def _next(self, ids: Tensor, tau: Tensor, fixed: int | None, cache: KeyValues) -> tuple[Tensor, Tensor]:
        """Logits of the next token ``(n, vocabulary)`` and the stage that gave them; the cache takes in ``ids``."""
        staged, h, n = self.staged, self.parts.embed(ids, cache.at), len(ids)
        final = staged.n_stages - 1 if fixed is None else fixed
        whole = cache.at == 0  # the prompt: every row goes to the end
        active, memory = torch.arange(n, device=ids.device), None
        left: list[tuple[Tensor, Tensor, Tensor]] = []
        seen: list[tuple[Tensor, Tensor | None]] = []
        for k in range(final + 1):
            cache.rows = None if len(active) == n else active
            h = self.parts.run(h, staged.span(k), cache)
            if fixed is not None and k < final:
                continue
            y = staged.last(k, h)
            score, memory = (None, memory) if k == final else self.gate(k, y, memory)
            seen.append((y, score))
            if whole:
                continue
            leave = torch.ones_like(active, dtype=torch.bool) if score is None else score >= tau[k]
            go, stay = leave.nonzero().squeeze(1), (~leave).nonzero().squeeze(1)
            if len(go):
                left.append((active[go], y[go], torch.full_like(go, k)))
                cache.rows = active[go]
                if fixed is None:
                    self.parts.fill(h[go], range(self.depths[k], self.depths[-1]), cache)
            if len(stay) == 0:
                break
            h, memory, active = take((h, memory, active), stay)
        cache.rows, cache.at = None, cache.at + ids.shape[1]
        if whole and fixed is not None:
            return seen[0][0], torch.full_like(active, fixed)
        if whole:
            scores = [s for _, s in seen if s is not None]
            y, choice, _ = pick(torch.stack([y for y, _ in seen], 1), torch.stack(scores, 1) if scores else h.new_zeros(n, 0), tau)
            return y, choice
        where, y, choice = (torch.cat(p) for p in zip(*left))
        order = where.argsort()
        return y[order], choice[order]

    def _prices(self, time: int, length: int) -> _Prices:
        key = "generate", time, length, parameter_shapes(self)
        if key not in self._tables:
            with evaluating(self), torch.inference_mode():
                prompt = self._counted(time, 0)
                first, last = (self._counted(1, past) if time < length else prompt for past in (time, length - 1))
                self._tables[key] = _Prices(prompt, first, last, max(1, length - 1 - time))  # type: ignore[assignment]
        return self._tables[key]  # type: ignore[return-value]

    def _counted(self, time: int, past: int) -> Tensor:
        """FLOPs for one row of ``time`` tokens after ``past`` others: layers, readout, gate and filling of each stage, ``(4, stages)``."""
        staged, device, cache, memory = self.staged, self.tau.device, KeyValues(1, time + past), None
        zeros = torch.zeros(1, time + past, dtype=torch.int64, device=device)
        if past:
            self.parts.run(self.parts.embed(zeros[:, :past]), range(self.depths[-1]), cache)
            cache.at = past
        h, rows = zeros[:, past:], []
        for k in range(staged.n_stages):
            counters = [FlopCounterMode(display=False) for _ in range(4)]
            with counters[0]:
                h = self.parts.run(h if k else self.parts.embed(h, past), staged.span(k), cache)
            with counters[1]:
                y = staged.last(k, h)
            with counters[2]:
                _, memory = (None, None) if k == staged.n_stages - 1 else self.gate(k, y, memory)
            with counters[3]:
                self.parts.fill(h, staged.span(k), cache)
            rows.append([c.get_total_flops() for c in counters])
        return torch.tensor(rows, dtype=torch.int64, device=device).T

    def _index(self, depth: int) -> int:
        if depth not in self.depths:
            raise BadInput(f"depth must be one of {self.depths}, which were trained, not {depth}")
        return self.depths.index(depth)

    def _check(self, x: Any) -> None:
        if not self.parts.text:
            return
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] == 0 or x.dtype != torch.int64:
            raise BadInput("expected token ids, int64 (rows, time)")
        if torch.compiler.is_exporting() or not x.numel():
            return
        low, high = map(int, x.aminmax())
        if not 0 <= low <= high < self.parts.vocabulary:
            raise BadInput(f"token ids must lie in 0..{self.parts.vocabulary - 1}, not {low}..{high}")

    def _check_target(self, out: Tensor, y: Tensor) -> None:
        if len(out) == 0:
            raise BadInput("an empty batch: pass at least one row")
        if y.is_floating_point():
            raise BadInput(f"targets must be integers, not {y.dtype}")
        check_labels(out, y)
        if bool((y == -100).all()):
            raise BadInput("every target is -100: there is nothing to learn from this batch")


@dataclass(frozen=True)
class _Prices:
    """FLOPs a row, ``(4, stages)`` each: of the prompt, of the first and of the last token that is read after it, ``steps`` apart."""

    prompt: Tensor
    first: Tensor
    last: Tensor
    steps: int

    def of(self, i: int, choice: Tensor, *, alone: bool) -> Tensor:
        """What new token i cost that left at stage ``choice`` (``alone``: a fixed depth, read out once)."""
        whole = i == 0
        # Attention is linear in what it looks at, the rest does not depend on it.
        table = self.prompt if whole else self.first + (self.last - self.first) * (i - 1) // self.steps
        layers, heads, gates, fills = table
        if alone:
            return layers.cumsum(0)[choice] + heads[choice]
        asked = (layers + heads + gates).cumsum(0)
        return asked[-1].expand(len(choice)) if whole else asked[choice] + (fills.sum() - fills.cumsum(0))[choice]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
