"""JEI-DNN: exits and the gates that choose between them, learned together on a frozen backbone.

The rows that a gate lets out at exit l are the rows on which classifier l should be good, and a gate should let out the rows on which
leaving is worth it. Neither can be learned without the other, so training alternates: gates imitate the exit of smallest cost under the
present classifiers; classifiers are trained on each row with the probability that the row really leaves there.

*Equations.* Exits l = 1..L, the last one the backbone's own head. Classifier logits f_l, gate g_l = sigmoid(w_l . m_l + b_l) on four
detached measures m_l of how sure f_l is (:func:`~neurarium.dynamic.gates.confidence`).

- *exit probability*: P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)) for l < L, P_L = 1 - sum_{l<L} P_l; at run time a row leaves at the first
  exit with P_l / (1 - sum_{j<l} P_j) >= 1/2 (:class:`~neurarium.dynamic.gates.LearnedGate`).
- *exit cost*: C_l = CE(f_l, y) + lambda ic_l, ic_l the FLOPs up to exit l over those of the whole network.
- *gate targets*: t_l = 1 for l >= argmin_j C_j, else 0: where an early exit was best, every later gate should say "leave" as well. Loss:
  binary cross-entropy, positives weighted by zeros/ones of that gate's targets.
- *classifier loss* of a row: (sum_l P_l CE_l) [sum_l CE_l / sum_l P_l CE_l], the bracket a constant: it moves weight between exits and
  leaves the row's total as it was.
- *warm-up*: CE_L + sum_{l<L} (L - l) CE_l, classifiers alone; each goes on from its best epoch on the validation data.

*Source.* Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural Network", arXiv 2310.09163.

*Departures.* Gates start at g_l = 1/L instead of at random, so that every classifier has a share from the first step. A classifier is put
back to its best warm-up epoch when the warm-up ends, instead of being frozen there when it stops improving: the classifiers do not
influence each other, so only a late recovery differs. Zeros/ones are counted with one added to both, since a gate may have no positive yet.

*Cost.* Training runs the backbone once where features are cached (:func:`~neurarium.dynamic.train.cached`); a gate costs 8 FLOPs and a
softmax an exit at run time. One trained policy for each lambda; ``calibrate`` gives budgets for one policy besides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.exits import EarlyExit, check_labels
from neurarium.dynamic.gates import FEATURES, LearnedGate, exit_probabilities
from neurarium.dynamic.outcome import Staged
from neurarium.errors import BadInput
from neurarium.learn.fit import to
from neurarium.roles import Loader

__all__ = ["JEIDNN", "gate_targets", "inference_loss", "warmup_loss"]

Target = Literal["cross_entropy", "error", "confidence"]


class JEIDNN(EarlyExit):
    """A staged network with jointly learned exits and gates. Freezes all of ``staged`` but its early heads, in place.

    Args:
        staged: a network with ``heads``, one a stage; :func:`~neurarium.dynamic.exits.with_exits` makes one of an ordinary model.
        tradeoff: lambda, what the full cost is worth in units of the target (nats of cross-entropy).
        gate_features: names from :data:`~neurarium.dynamic.gates.FEATURES`.
        alternate: batches of gate steps before as many batches of classifier steps.
        warmup_epochs: epochs of classifiers alone; needs ``begin_epoch`` to be called, as ``fit_policy`` does.
        target: what C_l counts as bad: ``"cross_entropy"``, ``"error"`` (0 or 1), ``"confidence"`` (1 - p(y) if right, else 1).

    ``loss(x, y, step)`` works in any loop; without ``begin_epoch`` there is no warm-up and positives have weight 1.
    """

    def __init__(
        self,
        staged: Staged,
        *,
        tradeoff: float = 0.7,
        gate_features: Sequence[str] = tuple(FEATURES),
        alternate: int = 200,
        warmup_epochs: int = 3,
        target: Target = "cross_entropy",
    ) -> None:
        if getattr(staged, "n_stages", 2) < 2:
            raise BadInput("JEI-DNN needs at least one exit before the last stage")
        if alternate < 1:
            raise BadInput(f"alternate must be at least 1 batch, not {alternate}")
        if not 0 <= tradeoff < math.inf:
            raise BadInput(f"tradeoff must be a finite number of at least 0, not {tradeoff}")
        if warmup_epochs < 0:
            raise BadInput(f"warmup_epochs must be at least 0, not {warmup_epochs}")
        if target not in ("cross_entropy", "error", "confidence"):
            raise BadInput(f"target must be 'cross_entropy', 'error' or 'confidence', not {target!r}")
        super().__init__(staged, LearnedGate(max(1, getattr(staged, "n_stages", 2) - 1), gate_features), threshold=0.5, frozen=True)
        self.tradeoff, self.alternate, self.warmup_epochs, self.target = tradeoff, alternate, warmup_epochs, target
        self.register_buffer("positive", torch.ones(staged.n_stages - 1))  # weight of a gate's positives
        self._warming, self._start = False, 0
        self._best: list[tuple[float, dict[str, Tensor]]] = []

    def phase(self, step: int) -> str:
        """``"warmup"``, ``"gate"`` or ``"inference"``: what the loss of this step trains."""
        if self._warming:
            return "warmup"
        return "gate" if (step - self._start) // self.alternate % 2 == 0 else "inference"

    def trainable(self, step: int = 0) -> list[nn.Parameter]:
        source = self.gate if self.phase(step) == "gate" else self.staged.heads[:-1]
        return [p for p in source.parameters() if p.requires_grad]

    def loss(self, x: Any, y: Tensor, step: int = 0) -> Tensor:
        phase = self.phase(step)
        with torch.set_grad_enabled(phase != "gate" and torch.is_grad_enabled()):
            # In a gate step the classifiers are constants: no statistics move, nothing is dropped.
            with evaluating(self.staged) if phase == "gate" else nullcontext():
                readouts = torch.stack(self.outputs(x), 1)  # (n, L, classes)
            check_labels(y, readouts)
            ce = _cross_entropy(readouts, y)
        if phase == "warmup":
            return warmup_loss(ce)
        logits = self.gate.logits(readouts)
        if phase == "inference":
            return inference_loss(ce, exit_probabilities(logits.sigmoid()).detach())
        targets = gate_targets(self.badness(readouts, y), self.relative_cost(x), self.tradeoff)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits), pos_weight=self.positive)

    def relative_cost(self, x: Any) -> Tensor:
        """ic, ``(L,)``: FLOPs up to each exit over the full FLOPs."""
        table = self.costs(x)
        return table.tensor(self.tau.device) / max(table.full, 1)

    def badness(self, readouts: Tensor, y: Tensor) -> Tensor:
        """The first term of C_l, ``(n, L, classes) -> (n, L)``."""
        if self.target == "cross_entropy":
            return _cross_entropy(readouts, y)
        right = readouts.argmax(-1) == y[:, None]
        if self.target == "error":
            return 1 - right.to(readouts.dtype)
        p = readouts.softmax(-1).gather(-1, y.view(-1, 1, 1).expand(-1, readouts.shape[1], 1)).squeeze(-1)
        return torch.where(right, 1 - p, 1.0)

    @torch.no_grad()
    def begin_epoch(self, epoch: int, step: int, loader: Loader) -> None:
        """Start, or end, the warm-up; look at ``loader`` to keep the best classifiers and to weigh the gates' positives."""
        ended = self._warming and epoch >= self.warmup_epochs
        if self._warming or epoch < self.warmup_epochs:
            self._keep_best(loader)
        self._warming = epoch < self.warmup_epochs
        if ended:
            for head, (_, state) in zip(self.staged.heads, self._best):
                head.load_state_dict(state)
            self._best, self._start = [], step
        if not self._warming:
            ones, n = torch.zeros_like(self.positive), 0
            for readouts, y, x in self._dense(loader):
                ones += gate_targets(self.badness(readouts, y), self.relative_cost(x), self.tradeoff).sum(0)
                n += len(y)
            self.positive.copy_((n - ones + 1) / (ones + 1))

    def _keep_best(self, loader: Loader) -> None:
        right = sum((readouts.argmax(-1) == y[:, None]).double().sum(0) for readouts, y, _ in self._dense(loader))
        for k, head in enumerate(self.staged.heads[:-1]):
            now = float(right[k]), copy.deepcopy(head.state_dict())
            if len(self._best) <= k:
                self._best.append(now)
            elif now[0] > self._best[k][0]:
                self._best[k] = now

    def _dense(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor, Any]]:
        with evaluating(self):
            for x, y in loader:
                x, y = to(x, self.tau.device), to(y, self.tau.device)
                readouts = torch.stack(self.outputs(x), 1)
                check_labels(y, readouts)
                yield readouts, y, x


def _cross_entropy(readouts: Tensor, y: Tensor) -> Tensor:
    """``(n, L, classes), (n,) -> (n, L)``."""
    return F.cross_entropy(readouts.transpose(1, 2), y[:, None].expand(-1, readouts.shape[1]), reduction="none")


def warmup_loss(ce: Tensor) -> Tensor:
    """CE_L + sum_{l<L} (L - l) CE_l, the mean over rows of ``(n, L)``."""
    exits = ce.shape[1]
    weight = torch.arange(exits - 1, -1, -1, device=ce.device, dtype=ce.dtype)
    weight[-1] = 1
    return (ce * weight).sum(1).mean()


def gate_targets(badness: Tensor, relative_cost: Tensor, tradeoff: float) -> Tensor:
    """t_l = [l >= argmin_j badness_j + lambda ic_j] for the exits that have a gate: ``(n, L), (L,) -> (n, L - 1)`` bool."""
    best = (badness + tradeoff * relative_cost.to(badness)).argmin(1, keepdim=True)
    return torch.arange(badness.shape[1] - 1, device=badness.device) >= best


def inference_loss(ce: Tensor, probability: Tensor) -> Tensor:
    """Each row's classifiers weighted by where the row leaves, its total kept: ``(n, L), (n, L) -> ()``."""
    weighted = (ce * probability).sum(1)
    keep = (ce.sum(1) / weighted.clamp(min=torch.finfo(ce.dtype).eps)).detach()
    return (weighted * keep).mean()
