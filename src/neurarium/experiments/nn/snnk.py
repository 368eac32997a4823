"""Random features for f(w.x + b), kernel layers and bundles on MNIST, and kernel adapters in a frozen text encoder.

Three parts. ``urf`` and ``urf_orthogonal`` estimate sin, cos and a windowed ReLU of w.x with more and more features (``conjugated``:
the same with the sign of psi's exponent turned, the likely mistake). The MNIST arms are an MLP 784-256-256-10, ``dense``, and what may
take its place: kernel layers (``snnk_relu``, ``snnk_cos``), low rank at the parameters of ``snnk_relu`` (``low_rank``) or of ``bundled``
(``low_rank_bundled``), the multiplied-out ``bundled``, and two closed forms, on random features (``fully_bundled``) and on pixels
(``raw_ridge``). The text arms adapt an encoder trained on three AG News topics to SMS spam: ``snnk_adapter`` (8 features a block),
``bottleneck`` (20 hidden units a block), ``linear_probe`` (nothing but the classifier) and ``full`` (every weight).
"""

from __future__ import annotations

import re
import zlib
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from neurarium import data, meter
from neurarium.experiments.images import images
from neurarium.learn.fit import Backprop, evaluate
from neurarium.nn.features import URF, ArcCos
from neurarium.nn.kernel_layer import KernelLinear, SNNKAdapter, bundle, fully_bundle

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

POINTS = ("urf", "urf_orthogonal", "conjugated")
#: the best peak learning rate of a grid in steps of about 3 for each network, on other seeds than those that are judged
NETS = {"dense": 1e-2, "snnk_relu": 1e-2, "snnk_cos": 1e-1, "low_rank": 1e-2, "low_rank_bundled": 1e-2, "bundled": 1e-1}
CLOSED = ("fully_bundled", "raw_ridge")
ADAPTERS = {"snnk_adapter": 1e-1, "bottleneck": 1e-2, "linear_probe": 1e-1, "full": 3e-3}
WIDTH, BLOCKS, LENGTH, WORDS = 64, 4, 24, 4096


def run(trial: Trial) -> None:
    for arm in trial.arms(*POINTS):
        sizes = trial.scale(smoke=[16, 64, 256], laptop=[16, 32, 64, 128, 256, 512, 1024])
        found = pointwise(arm.name, sizes, draws=trial.scale(smoke=10, laptop=60), generator=trial.generator())
        arm.log(m=sizes, **found)

    epochs = trial.scale(smoke=1, laptop=5)
    for arm in trial.arms(*NETS, *CLOSED):
        task = trial.shared("images", lambda: images(trial, train=(500, 10_000), test=(300, 2000), size=trial.scale(smoke=14, laptop=28)))
        x, y = task.train.x.flatten(1).to(trial.device), task.train.y.to(trial.device)
        with arm.timed("fit_seconds"):
            if arm.name in NETS:
                model = network(arm.name, inner=x.shape[1]).to(trial.device)
                batches = data.TensorData(x, y).batches(100, seed=trial.seed)
                train(model, batches, epochs, NETS[arm.name], trial.seed)
            else:
                features = ArcCos(x.shape[1], 1000).to(trial.device) if arm.name == "fully_bundled" else Intercept()
                scale = 1e-4 if arm.name == "fully_bundled" else 1e-2  # the better of a few, as the learning rates
                model = fully_bundle(features, x, y, ridge=scale * len(x))
        test = data.TensorData(task.test.x.flatten(1), task.test.y).to(trial.device)
        fixed = sum(b.numel() for b in model.buffers())
        trained = meter.parameters(model)
        arm.log(accuracy=evaluate(model, test.batches(1000, shuffle=False))["accuracy"], params=trained, stored=trained + fixed)
        arm.log(flops=meter.flops(model.eval(), x[:1]), bytes=meter.stored_bytes(model))

    for arm in trial.arms(*ADAPTERS):
        texts = trial.shared("texts", lambda: messages(trial))
        model = trial.shared("encoder", lambda: pretrain(trial)).to(trial.device)
        model.head = nn.Linear(WIDTH, 2).to(trial.device)
        if arm.name != "full":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
            adapters(arm.name, model)
        batches = texts[0].to(trial.device).batches(50, seed=trial.seed)
        with arm.timed("fit_seconds"):
            train(model, batches, trial.scale(smoke=1, laptop=5), ADAPTERS[arm.name], trial.seed)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = evaluate(model, texts[1].to(trial.device).batches(400, shuffle=False))
        arm.log(accuracy=found["accuracy"], loss=found["loss"], params=trained)


def train(model: nn.Module, batches: data.Batches, epochs: int, lr: float, seed: int) -> None:
    schedule = partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(batches))
    Backprop(optimizer=partial(AdamW, lr=lr), schedule=schedule, clip=1.0).fit(model, batches, epochs=epochs, seed=seed)


def pointwise(arm: str, sizes: list[int], draws: int, generator: torch.Generator) -> dict[str, list[float]]:
    """Root mean square error of the estimates of f(w.x), relative to f's, at every number of features."""
    device = generator.device
    pair = functional.normalize(torch.randn(2, 16, 64, generator=generator, device=device), dim=2)
    x, w = pair[0], functional.normalize(pair[1] + pair[0], dim=1)  # w.x about 0.7
    kinds = {"sin": {"f": "sin"}, "cos": {"f": "cos"}, "relu": {"f": "relu", "window": 2.0, "smooth": 1.0}}
    found: dict[str, list[float]] = {}
    seeds = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=device)))
    for name, options in kinds.items():
        found[name] = []
        for m in sizes:
            features = URF(64, m, orthogonal=arm == "urf_orthogonal", **options).to(device)
            exact, errors = features.kernel(x, w), []
            for _ in range(draws):
                features.redraw(seeds)
                psi = features.psi(w) * (np.exp(-1.0) if arm == "conjugated" else 1.0)  # exp(-|w|^2 / 2) for exp(+|w|^2 / 2)
                errors.append(((features.phi(x) * psi).sum(1) - exact).square().mean())
            found[name].append((torch.stack(errors).mean() / exact.square().mean()).sqrt().item())
    return found


class LowRank(nn.Sequential):
    """A dense layer as a product of two."""

    def __init__(self, inner: int, out: int, rank: int) -> None:
        super().__init__(nn.Linear(inner, rank, bias=False), nn.Linear(rank, out))


class Intercept(nn.Module):
    """The input and a constant: linear regression."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(len(x), 1)], 1)


def network(arm: str, inner: int = 784, hidden: int = 256, m: int = 64) -> nn.Module:
    """The MLP of one arm."""
    rank = {"low_rank": m * 2 * hidden // (inner + 3 * hidden) + 1, "low_rank_bundled": 2}.get(arm, 0)
    if arm == "dense":
        return nn.Sequential(nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    if rank:
        return nn.Sequential(LowRank(inner, hidden, rank), nn.ReLU(), LowRank(hidden, hidden, rank), nn.ReLU(), nn.Linear(hidden, 10))
    kind = "cos" if arm == "snnk_cos" else "relu"
    layers = [KernelLinear(inner, hidden, kind, m), KernelLinear(hidden, hidden, kind, m, seed=1), nn.Linear(hidden, 10)]
    return bundle(nn.Sequential(*layers)) if arm == "bundled" else nn.Sequential(*layers)


class Encoder(nn.Module):
    """Hashed words to classes: embedding, transformer blocks, mean over the words."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.adapters = nn.ModuleList([nn.Identity() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, ids: Tensor) -> Tensor:
        seen = ids > 0
        x = self.words(ids) + self.places
        for block, adapter in zip(self.blocks, self.adapters):
            x = adapter(block(x, seen))
        x = self.norm(x) * seen[:, :, None]
        return self.head(x.sum(1) / seen.sum(1, keepdim=True).clamp(min=1))


class Block(nn.Module):
    """Pre-normalised attention of four heads and a layer of twice the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Bottleneck(nn.Module):
    """x + U relu(D x), the identity at first."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(functional.relu(self.down(x)))


def adapters(arm: str, model: Encoder) -> None:
    """Put the arm's adapter behind every block."""
    make = {"snnk_adapter": lambda i: SNNKAdapter(WIDTH, 8, seed=i), "bottleneck": lambda i: Bottleneck(20)}.get(arm)
    if make is not None:
        model.adapters = nn.ModuleList([make(i) for i in range(BLOCKS)]).to(model.places.device)


def encode(documents: tuple[str, ...]) -> Tensor:
    """The first words as numbers in 2..WORDS-1 by a hash; 1 begins every document, 0 fills up."""
    ids = torch.zeros(len(documents), LENGTH, dtype=torch.int64)
    for row, document in zip(ids, documents):
        words = re.findall(r"[a-z]+|\d+|[^\w\s]", document.lower())[: LENGTH - 1]
        row[: len(words) + 1] = torch.tensor([1, *(2 + zlib.crc32(w.encode()) % (WORDS - 2) for w in words)])
    return ids


def pretrain(trial: Trial) -> Encoder:
    """The encoder, trained on the first three topics of AG News."""
    task = data.text("ag-news", seed=trial.seed)
    rows = torch.where(task.train.labels < 3)[0][: trial.scale(smoke=200, laptop=3000)]
    ids = encode(tuple(task.train.documents[i] for i in rows.tolist()))
    model = Encoder(3).to(trial.device)
    batches = data.TensorData(ids, task.train.labels[rows]).to(trial.device).batches(50, seed=trial.seed)
    train(model, batches, trial.scale(smoke=1, laptop=2), 3e-3, trial.seed)
    return model


def messages(trial: Trial) -> tuple[data.TensorData, data.TensorData]:
    """SMS spam: messages to train on, and all that are held out."""
    task = data.text("sms-spam", seed=trial.seed)
    held = data.TensorData(encode(task.valid.documents + task.test.documents), torch.cat([task.valid.labels, task.test.labels]))
    n = trial.scale(smoke=200, laptop=1500)
    return data.TensorData(encode(task.train.documents[:n]), task.train.labels[:n]), held


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """Error against the number of features, and accuracy against trained parameters on MNIST and on SMS."""
    fig.set_size_inches(13, 4.2)
    left, middle, right = fig.subplots(1, 3)
    colours = {"sin": "#0072B2", "cos": "#D55E00", "relu": "#009E73"}
    for arm, style, note in (("urf", "-", "independent"), ("urf_orthogonal", "--", "orthogonal"), ("conjugated", ":", "sign turned")):
        for name, colour in colours.items():
            values = record.values(arm, name)
            if arm == "conjugated" and name == "relu":
                continue
            m = record.values(arm, "m")[0]
            left.loglog(m, values.mean(0), style, color=colour, label=f"{name}, {note}" if name == "sin" or style == "-" else None)
    m = record.values("urf", "m")[0]
    left.loglog(m, 0.6 * (m / m[0]) ** -0.5, color="#999999", linewidth=4, alpha=0.5, zorder=0, label="slope -1/2")
    left.set(xlabel="random features m", ylabel="relative error", title="f(w.x) from a dot product of features")
    left.set_xticks(m[::2], [f"{int(v)}" for v in m[::2]])
    left.minorticks_off()
    left.legend(fontsize=7)

    names = {"dense": "dense", "snnk_relu": "kernel layers, relu", "snnk_cos": "kernel layers, cos", "low_rank": "low rank",
             "bundled": "bundled", "low_rank_bundled": "low rank 2",
             "fully_bundled": "closed form, features", "raw_ridge": "closed form, pixels"}  # fmt: skip
    texts = {"snnk_adapter": "kernel adapter", "bottleneck": "bottleneck", "linear_probe": "classifier alone", "full": "all weights"}
    for axis, table, title in ((middle, names, "MNIST, 10,000 images"), (right, texts, "News encoder adapted to SMS spam")):
        for arm, label in table.items():
            accuracy, x = 100 * record.values(arm, "accuracy"), record.mean(arm, "params")
            ours = any(word in arm for word in ("snnk", "bundled")) and not arm.startswith("low_rank")
            colour = "#0072B2" if ours else "#000000"
            spread = float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else 0.0
            axis.errorbar(x, accuracy.mean(), yerr=spread, fmt="o" if ours else "s", color=colour, capsize=3)
            place = {"xytext": (-6, -11), "ha": "right"} if arm in ("dense", "full") else {"xytext": (6, 4)}
            if arm in ("raw_ridge", "snnk_cos", "low_rank", "fully_bundled"):  # below, where a neighbour's name is above
                place = {"xytext": (6, -11)}
            axis.annotate(label, (x, accuracy.mean()), textcoords="offset points", fontsize=8, color=colour, **place)
        axis.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy (%)", title=title)
        axis.margins(x=0.25, y=0.12)
    fig.tight_layout()
