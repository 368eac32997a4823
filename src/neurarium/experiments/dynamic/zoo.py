"""Data and trained networks that the room's experiments share.

Networks are trained once for a configuration, a seed and a version of this code, and kept in the cache folder. An experiment calls them
inside ``trial.shared``.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data
from neurarium.data import ImageTask
from neurarium.dynamic.backbones import BackboneS
from neurarium.dynamic.decoder import Decoder
from neurarium.errors import MissingData
from neurarium.experiments.compress.zoo import cached, next_token_loss, sentences
from neurarium.experiments.images import images, replaced
from neurarium.learn.fit import Backprop
from neurarium.meter import latency

if TYPE_CHECKING:
    from neurarium.lab import Trial

__all__ = [
    "Graded", "Language", "TrainedDecoder", "backbone", "bits_per_character", "characters", "cifar", "decoder", "graded", "language",
    "mnist", "time_ratio", "train", "trained",
]  # fmt: skip


@dataclass(frozen=True)
class Graded:
    """Images with noise whose strength differs from image to image, and that strength (a standard deviation) for each."""

    task: ImageTask
    train_noise: Tensor
    noise: Tensor  # of the test images


def mnist(trial: Trial, *, train: int = 6000, test: int = 2000, size: int = 28, standardise: bool = True) -> ImageTask:
    """MNIST, standardised; 400 and 200 images at the scale smoke. It stands in for Fashion-MNIST, which few mirrors hold."""
    return images(trial, "mnist", train=(400, train), test=(200, test), size=size, standardise=standardise)


def cifar(trial: Trial, *, train: int = 6000, test: int = 2000, size: int = 32) -> ImageTask:
    """CIFAR-10, standardised by channel; 400 and 200 images of 16 pixels at the scale smoke."""
    return images(trial, "cifar10", train=(400, train), test=(200, test), size=trial.scale(smoke=16, laptop=size), standardise=True)


def graded(trial: Trial, *, train: int = 6000, test: int = 2000, size: int = 28) -> Graded:
    """MNIST with Gaussian noise of standard deviation 0.9 u^2 pixel ranges, u uniform, so that easy and hard rows exist.

    The noise is added to pixels in [0, 1]; the images are standardised afterwards, by the training images.
    """
    clean = mnist(trial, train=train, test=test, size=size, standardise=False)
    draw = torch.Generator().manual_seed(trial.seed)
    strength = [0.9 * torch.rand(len(part), generator=draw).square() for part in (clean.train, clean.test)]
    x = [p.x + s.view(-1, 1, 1, 1) * torch.randn(p.x.shape, generator=draw) for p, s in zip((clean.train, clean.test), strength)]
    mean, std = x[0].mean(), x[0].std()
    return Graded(replaced(clean, [(part - mean) / std for part in x]), *strength)


def train(
    model: nn.Module, batches: Any, *, epochs: int, lr: float = 5e-3, loss: Any = "cross_entropy", seed: int = 0, clip: float | None = None
) -> nn.Module:
    """AdamW with one cycle of the learning rate, in place; eval mode after."""
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    optimizer = partial(AdamW, lr=lr, fused=True)  # one kernel for all parameters
    Backprop(loss=loss, optimizer=optimizer, schedule=schedule, clip=clip).fit(model, batches, epochs=epochs, seed=seed)
    return model.eval()


def trained(name: str, trial: Trial, make: Callable[[], nn.Module], fit: Callable[[nn.Module], Any], **config: Any) -> nn.Module:
    """What ``make`` and ``fit`` give under the trial's seed, kept on disk by ``config`` (JSON values) and by the sources of both."""
    sources = [inspect.getsource(inspect.getmodule(f.func if isinstance(f, partial) else f)) for f in (make, fit, trained)]
    mark = hashlib.sha256("".join(sources).encode()).hexdigest()
    return cached({"name": name, "scale": trial.name, "sources": mark, **config}, trial, make, fit)


def backbone(trial: Trial, task: ImageTask, *, epochs: int = 4) -> BackboneS:
    """The static BackboneS: trained by its last head alone; the early heads are left as they were drawn."""
    epochs = trial.scale(smoke=2, laptop=epochs)
    channels = task.train.x.shape[1]

    def fit(model: nn.Module) -> None:
        train(model, task.train.batches(64, seed=trial.seed), epochs=epochs, seed=trial.seed)

    def make() -> nn.Module:
        return BackboneS(channels, task.classes)

    seen = {"shape": list(task.train.x.shape), "sum": float(task.train.x.double().sum()), "epochs": epochs}
    model = trained("backbone-s", trial, make, fit, **seen)
    assert isinstance(model, BackboneS)
    return model


@dataclass(frozen=True)
class Language:
    """Token ids (int64, one long row) of one text in a shared vocabulary."""

    train: Tensor
    test: Tensor

    def batches(self, context: int, steps: int, rows: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """``steps`` batches of random windows: (ids, next ids), both (rows, context)."""
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train) - context - 1, (steps, rows), generator=draw)
        windows = self.train[starts[:, :, None] + torch.arange(context + 1)]
        return [(w[:, :-1], w[:, 1:]) for w in windows]

    def held_out(self, context: int, rows: int = 250) -> tuple[Tensor, Tensor]:
        """The first windows of the held-out text, without overlap: (ids, next ids), both (at most rows, context)."""
        rows = min(rows, (len(self.test) - 1) // context)
        ids, target = (self.test[i : i + rows * context].reshape(rows, -1) for i in (0, 1))
        return ids, target


def characters(trial: Trial, *names: str) -> dict[str, str]:
    """Texts by name (``tiny-shakespeare``, ``wikitext-2``, ``sms-spam``, ``ag-news``); a small grammar where one is not here."""
    texts = {}
    for i, name in enumerate(names):
        try:
            texts[name] = data.text(name).train.text
        except MissingData:
            trial.stand_in(f"words drawn from a small grammar instead of {name}, which is not here")
            texts[name] = sentences(40_000)[i * 10 :]
    return texts


def language(texts: dict[str, str], *, longest: int = 400_000) -> tuple[dict[str, Language], str]:
    """Each text as ids, its last tenth held out, and the vocabulary: the 95 commonest characters of all texts, and one for the others."""
    cut = {name: text[:longest] for name, text in texts.items()}
    counts: dict[str, int] = {}
    for text in cut.values():
        for c in set(text):
            counts[c] = counts.get(c, 0) + text.count(c)
    vocabulary = "".join(sorted(sorted(counts, key=lambda c: (-counts[c], c))[:95])) + "\ufffd"
    place = {c: i for i, c in enumerate(vocabulary)}
    result = {}
    for name, text in cut.items():
        ids = torch.tensor([place.get(c, len(vocabulary) - 1) for c in text])
        result[name] = Language(ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :])
    return result, vocabulary


@dataclass(frozen=True)
class TrainedDecoder:
    """A pretrained character decoder and how to read characters for it."""

    model: Decoder
    vocabulary: str


def decoder(
    trial: Trial,
    source: Language,
    vocabulary: str,
    *,
    layers: int = 8,
    width: int = 96,
    heads: int = 4,
    context: int = 96,
    steps: int = 400,
    rows: int = 16,
    lr: float = 3e-3,
) -> TrainedDecoder:
    """A decoder pretrained on the windows of ``source`` (two layers of width 32 and 30 steps at the scale smoke; context 32)."""
    if trial.name == "smoke":
        layers, width, context, steps = min(layers, 4), 32, 32, 30
    config = {"layers": layers, "width": width, "heads": heads, "context": context, "steps": steps, "rows": rows, "lr": lr}

    def fit(model: nn.Module) -> None:
        batches = source.batches(context, steps, rows, seed=trial.seed)
        train(model, batches, epochs=1, lr=lr, loss=next_token_loss, seed=trial.seed, clip=1.0)

    def make() -> nn.Module:
        return Decoder(len(vocabulary), width=width, heads=heads, layers=layers, context=context)

    mark = hashlib.sha256(source.train.numpy().tobytes()).hexdigest()
    model = trained("decoder", trial, make, fit, text=mark, vocabulary=vocabulary, **config)
    assert isinstance(model, Decoder)
    return TrainedDecoder(model, vocabulary)


@torch.no_grad()
def bits_per_character(logits: Tensor, target: Tensor) -> float:
    """Mean cross-entropy in bits of (n, time, vocabulary) logits."""
    return float(F.cross_entropy(logits.flatten(0, -2), target.flatten())) / 0.6931471805599453


def time_ratio(policy: Any, x: Tensor, *, rows: int = 64, repeats: int = 7, **setting: Any) -> float:
    """Median seconds of ``decide`` in compact mode over those in masked mode, in batches of ``rows``, interleaved."""
    parts = x.split(rows)
    with torch.no_grad():
        timings = latency(
            {mode: partial(lambda m: [policy.decide(part, mode=m, **setting) for part in parts], mode) for mode in ("compact", "masked")},
            repeats=repeats,
            warmup=2,
        )
    return timings["compact"].median / timings["masked"].median
