"""The small trained networks that the room's experiments compress, all trained by plain backpropagation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from neurarium.data import ImageTask
from neurarium.learn.fit import Backprop

__all__ = ["accuracy", "convnet", "mlpnet"]


def mlpnet(task: ImageTask, *, epochs: int = 5, seed: int = 0) -> nn.Module:
    """The MLPNet of the pruning literature: pixels-40-20-10 without biases, 32,360 weights at 28 x 28."""
    pixels = task.train.x[0].numel()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 40, bias=False), nn.ReLU(), nn.Linear(40, 20, bias=False), nn.ReLU(),
        nn.Linear(20, task.classes, bias=False),
    ).to(task.train.x.device)  # fmt: skip
    learner = Backprop(optimizer=partial(SGD, lr=0.1, momentum=0.9))
    learner.fit(model, task.train.batches(128, seed=seed), epochs=epochs, seed=seed)
    return model.eval()


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def convnet(task: ImageTask, *, widths: tuple[int, int, int] = (8, 16, 32), epochs: int = 4, seed: int = 0) -> nn.Module:
    """A ResNet-8 whose first convolution has stride 2."""
    channels = task.train.x.shape[1]
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for into, out, stride in zip((widths[0], *widths), widths, (1, 2, 2), strict=False):
        layers.append(Residual(into, out, stride))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], task.classes)).to(task.train.x.device)
    batches = task.train.batches(128, seed=seed)
    tune(model, batches, epochs=epochs, lr=0.15, seed=seed)
    return model.eval()


def tune(model: nn.Module, batches: object, *, epochs: int, lr: float, seed: int) -> None:
    """SGD with Nesterov momentum and one cycle of the learning rate."""
    steps = epochs * len(batches)  # type: ignore[arg-type]
    learner = Backprop(
        optimizer=partial(SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=partial(OneCycleLR, max_lr=lr, total_steps=steps),
    )
    learner.fit(model, batches, epochs=epochs, seed=seed)  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(model: nn.Module, task: ImageTask) -> float:
    """Share of the test images classified right, in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.test.batches(2000, shuffle=False))
    return right / len(task.test)
