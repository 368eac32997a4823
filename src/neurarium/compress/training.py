"""Training a network on while it is being compressed: backpropagation that also takes models whose output is a structure with `.logits`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from neurarium.learn.fit import Backprop

__all__ = ["Tuning"]


class Tuning(Backprop):
    """:class:`~neurarium.learn.Backprop` for Hugging Face's models as well: the loss function gets their output as it is.

    The history's accuracy is that of ``output.logits`` where the output is no tensor.
    """

    def gradients(self, model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, output = super().gradients(model, x, y)
        return loss, output if isinstance(output, Tensor) else output.logits
