"""The small trained networks that the room's experiments compress, all trained by plain backpropagation.

``resnet``, ``vgg``, ``mobilenet`` and ``gpt`` are trained once for a configuration, a seed and a version of this code, and kept in the
cache folder, so that the experiments share them. An experiment calls them inside ``trial.shared``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data
from neurarium.compress.gpt import GPT
from neurarium.data import ImageTask, TensorData
from neurarium.data.store import atomic, cache_dir
from neurarium.errors import MissingData
from neurarium.experiments.images import images
from neurarium.learn import fit
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from neurarium.lab import Trial

__all__ = [
    "Augmented", "TrainedGPT", "accuracy", "cached", "cifar", "convnet", "finetune", "gpt", "mlpnet", "mnist", "mobilenet",
    "next_token_loss", "reestimate_bn", "resnet", "sentences", "vgg",
]  # fmt: skip


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


def cifar(trial: Trial) -> ImageTask:
    """CIFAR-10, standardised by channel: 10,000 training and 2,000 test images (16 x 16 and few at the scale smoke)."""
    size = trial.scale(smoke=16, laptop=32)
    return images(trial, "cifar10", train=(300, 10_000), test=(200, 2000), size=size, standardise=True)


def mnist(trial: Trial) -> ImageTask:
    """MNIST at 28 x 28: 10,000 training and 2,000 test images (14 x 14 and few at the scale smoke)."""
    return images(trial, "mnist", train=(400, 10_000), test=(200, 2000), size=trial.scale(smoke=14, laptop=28), standardise=True)


class Augmented:
    """Batches mirrored at random and shifted by at most two pixels, in channels-last order; pass i is always the same."""

    def __init__(self, train: TensorData, batch_size: int = 128, *, seed: int = 0) -> None:
        self.batches, self.seed = train.batches(batch_size, seed=seed), seed

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.batches.epoch)
        for x, y in self.batches:
            n, _, height, width = x.shape
            mirrored = torch.rand(n, generator=draw) < 0.5
            down, right = torch.randint(0, 5, (2, n, 1), generator=draw)
            rows, columns = down + torch.arange(height), right + torch.arange(width)
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
            padded = F.pad(x, (2, 2, 2, 2)).permute(0, 2, 3, 1)  # indexing leaves it channels-last
            x = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            yield x, y


def finetune(model: nn.Module, task: ImageTask, *, epochs: int, lr: float = 0.02, seed: int = 0) -> nn.Module:
    """Trains `model` on in place by `tune` on augmented batches, and gives it back in eval mode."""
    tune(model.train(), Augmented(task.train, seed=seed), epochs=epochs, lr=lr, seed=seed)
    return model.eval()


@torch.no_grad()
def reestimate_bn(model: nn.Module, x: Tensor, batch_size: int = 256) -> nn.Module:
    """Sets the running statistics of each batch normalisation to the averages over the unlabelled `x`, in place; eval mode after."""
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average over the batches
        m.train()
    for part in x.split(batch_size):
        model(part)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def resnet(trial: Trial, task: ImageTask, *, depth: int = 8, epochs: int = 12) -> nn.Module:
    """A ResNet of `depth` 8 or 14 with widths 16, 32 and 64 (6, 8 and 12 at the scale smoke), the first convolution with stride 2."""
    widths = trial.scale(smoke=(6, 8, 12), laptop=(16, 32, 64))

    def make() -> nn.Module:
        layers: list[nn.Module] = [*_unit(task.train.x.shape[1], widths[0], stride=2)]
        for into, out, stride in zip((widths[0], *widths), widths, (1, 2, 2), strict=False):
            layers += [Residual(into, out, stride), *(Residual(out, out, 1) for _ in range((depth - 8) // 6))]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], task.classes))

    return _images(trial, task, f"resnet{depth}", make, epochs, lr=0.15)


def vgg(trial: Trial, task: ImageTask, *, epochs: int = 12) -> nn.Module:
    """Six 3 x 3 convolutions with batch normalisation and two linear layers; the first convolution has stride 2."""
    widths = trial.scale(smoke=(6, 6, 8, 8, 12, 12), laptop=(16, 32, 32, 64, 64, 64))

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (into, out) in enumerate(zip((task.train.x.shape[1], *widths), widths, strict=False)):
            layers += [*_unit(into, out, stride=2 if i == 0 else 1), *([nn.MaxPool2d(2)] if i % 2 else [])]
        side = task.train.x.shape[-1] // 16
        return nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * side * side, widths[-1]), nn.ReLU(), nn.Linear(widths[-1], task.classes)
        )

    return _images(trial, task, "vgg", make, epochs, lr=0.1)


def mobilenet(trial: Trial, task: ImageTask, *, epochs: int = 12) -> nn.Module:
    """Depthwise-separable blocks of the widths of a MobileNet-v1 x 0.5 from its second block on, for small images."""
    widths = trial.scale(smoke=(16, 16, 32), laptop=(32, 64, 64, 128, 128, 128))

    def make() -> nn.Module:
        layers: list[nn.Module] = [*_unit(task.train.x.shape[1], 16, stride=2)]
        for i, (into, out) in enumerate(zip((16, *widths), widths, strict=False)):
            stride = 2 if i in (1, 3) else 1
            layers += [*_unit(into, into, stride=stride, groups=into), *_unit(into, out, kernel=1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], task.classes))

    return _images(trial, task, "mobilenet", make, epochs, lr=0.15)


def _unit(into: int, out: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _images(trial: Trial, task: ImageTask, name: str, make: Callable[[], nn.Module], epochs: int, lr: float) -> nn.Module:
    epochs = trial.scale(smoke=2, laptop=epochs)
    config = {
        "name": name, "task": task.name, "shape": list(task.train.x.shape), "scale": trial.name, "epochs": epochs, "lr": lr,
        "sum": float(task.train.x.double().sum()),
    }  # fmt: skip

    def train(model: nn.Module) -> None:
        finetune(model.to(memory_format=torch.channels_last), task, epochs=epochs, lr=lr, seed=trial.seed)

    return _cached(config, trial, make, train)


@dataclass
class TrainedGPT:
    """A character model with the texts that it was trained and is judged on (int64 token ids)."""

    model: GPT
    train: Tensor
    valid: Tensor
    test: Tensor

    def loader(self, rows: int = 128, batch_size: int = 16, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """`rows` windows of the training text in batches: (ids, next ids), both (batch, context)."""
        start = torch.randint(len(self.train) - self.model.context - 1, (rows,), generator=torch.Generator().manual_seed(seed))
        window = self.train[start[:, None] + torch.arange(self.model.context + 1)]
        return [(part[:, :-1], part[:, 1:]) for part in window.split(batch_size)]

    @torch.no_grad()
    def loss(self, model: nn.Module | None = None, rows: int = 250) -> float:
        """Mean cross-entropy (nats a character) over the first `rows` windows of the held-out text."""
        model = (self.model if model is None else model).eval()
        rows = min(rows, (len(self.test) - 1) // self.model.context)
        ids, target = (self.test[i : i + rows * self.model.context].reshape(rows, -1) for i in (0, 1))
        return float(next_token_loss(model(ids), target))


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of (batch, time, vocabulary) logits."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def gpt(trial: Trial, *, width: int = 96, heads: int = 6, layers: int = 3, steps: int = 1500) -> TrainedGPT:
    """The character model in OPT's form on tiny Shakespeare, context 64: AdamW 5e-3 in one cycle, batches of 24."""
    try:
        task = data.text("tiny-shakespeare")
        vocabulary, ids = len(task.characters), {k: task.encode(getattr(task, k).text) for k in ("train", "valid", "test")}
        name = task.name
    except MissingData:
        trial.stand_in("words drawn from a small grammar instead of tiny Shakespeare, which is not here")
        text = _sentences(60_000)
        characters = sorted(set(text))
        whole = torch.tensor([characters.index(c) for c in text])
        vocabulary, name = len(characters), "grammar"
        ids = {"train": whole[:50_000], "valid": whole[50_000:55_000], "test": whole[55_000:]}
    if trial.name == "smoke":
        width, heads, layers, steps = 32, 4, 2, 40
    config = {"name": "gpt", "task": name, "vocabulary": vocabulary, "width": width, "heads": heads, "layers": layers, "steps": steps}

    def train(model: nn.Module) -> None:
        draw = torch.Generator().manual_seed(trial.seed)
        starts = torch.randint(len(ids["train"]) - 65, (steps, 24), generator=draw)
        windows = ids["train"][starts[:, :, None] + torch.arange(65)]
        learner = Backprop(
            loss=next_token_loss,
            optimizer=partial(AdamW, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05),
            schedule=partial(OneCycleLR, max_lr=5e-3, total_steps=steps, pct_start=0.1),
            clip=1.0,
        )
        learner.fit(model, [(w[:, :-1], w[:, 1:]) for w in windows], epochs=1, seed=trial.seed)

    model = _cached(config, trial, partial(GPT, vocabulary, width=width, heads=heads, layers=layers, context=64), train)
    assert isinstance(model, GPT)
    return TrainedGPT(model, ids["train"], ids["valid"], ids["test"])


def _sentences(length: int) -> str:
    draw = torch.Generator().manual_seed(0)
    parts = [["the", "a", "every", "no"], ["cat", "king", "sea", "clock", "child"], ["sees", "loves", "hears", "finds"]]
    words: list[str] = []
    while sum(map(len, words)) + len(words) < length:
        for part in (*parts, *parts[:2]):
            words.append(part[int(torch.randint(len(part), (), generator=draw))])
        words[-1] += "."
    return " ".join(words)[:length]


def _cached(config: dict[str, Any], trial: Trial, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """The model that `make` and `train` give under the trial's seed, from the cache if these very sources trained it before."""
    code = "".join(map(inspect.getsource, (inspect.getmodule(_cached), inspect.getmodule(GPT), fit)))  # type: ignore[arg-type]
    mark = hashlib.sha256(json.dumps([config, trial.seed, torch.__version__, code], sort_keys=True).encode()).hexdigest()[:20]
    path = cache_dir() / "zoo" / f"{config['name']}-{mark}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = make()
        try:
            model.load_state_dict(torch.load(path, weights_only=True))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            train(model)
            with atomic(path) as out:
                torch.save(model.state_dict(), out)
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model.eval().to(trial.device)


cached, sentences = _cached, _sentences  # for the experiments of other rooms
