"""Range entropy: does the smooth stand-in rank sets as the exact entropy does, does it make hulls cheaper and attention prunable?

``ball_*``: 50 sets of 9 points; the exact entropy over all partitions into pieces that fit into a disc, against the surrogate at four
sharpnesses (alpha times the squared radius), and with four random anchors. Hull arms: 20,000 points of six families, work in
orientation tests, geometric mean over the families: ``raw``; ``entropynet`` (points moved by the trained net), ``jitter`` (every
point moved as far at random), ``thin`` (a random subset, the smallest of a halving sequence whose area error is within the net's),
``certified`` (raw points, the net's ranges only to drop inner cells: exact). The net is trained on sets of 400 points of all families,
at the largest strength of a grid whose area error on validation sets is at most 0.002.

Attention arms: segment majority. 64 symbols in 4 segments of 16; the query names a segment, the label is its most frequent symbol. One
model is trained without a penalty; every arm trains on from there with its penalty ramped in, at the largest strength (of three) that
costs at most one point on validation; then all but the largest weights of every row are cut.
"""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.nn.entropy import AttentionCall, EntropyNet, attention_calls, cover, range_entropy_attention, soft_entropy
from neurarium.nn.hull import instance_optimal_hull
from neurarium.nn.replace import replace_layers

if TYPE_CHECKING:
    import matplotlib.figure

    from neurarium.lab import RecordView, Trial

SHARPNESS = {"ball_03": 0.3, "ball_1": 1.0, "ball_10": 10.0, "ball_100": 100.0, "ball_random": 10.0}
RADIUS = 0.3
FAMILIES = ("disc", "square", "gaussian", "annulus", "clustered", "circle")
HULLS = ("raw", "entropynet", "jitter", "thin", "certified")
PENALTIES = ("none", "l1_logits", "row_entropy", "range_entropy", "range_balls")
STRENGTHS = (1.0, 3.0, 10.0)
KEEP = (1.0, 0.5, 0.2, 0.1)
SYMBOLS, SEGMENTS, SIZE = 6, 4, 16


def run(trial: Trial) -> None:
    for arm in trial.arms(*SHARPNESS):
        sets = trial.shared("sets", lambda: small_sets(trial))
        places = (lambda x: torch.rand(4, 2)) if arm.name == "ball_random" else partial(cover, radius=RADIUS)
        estimates = [soft_entropy(x, places(x), SHARPNESS[arm.name] / RADIUS**2).item() for x, _ in sets]
        exact = [entropy for _, entropy in sets]
        arm.log(spearman=spearman(estimates, exact))
        arm.curve("estimates", x=exact, y=estimates)

    hulls(trial)

    for arm in trial.arms(*PENALTIES):
        start = trial.shared("attention", lambda: pretrained(trial))
        task = trial.shared("task", lambda: majority_task(trial))
        plain = trial.shared("unpenalised", partial(finetuned, "none", 0.0, start, task, trial))
        strength, model, floor = 0.0, plain, accuracy(plain, task["val"]) - 0.01
        for more in () if arm.name == "none" else trial.scale(smoke=(0.3,), laptop=STRENGTHS):
            candidate = finetuned(arm.name, more, start, task, trial)
            if strength == 0 or accuracy(candidate, task["val"]) >= floor:
                strength, model = more, candidate
        kept = [accuracy(model, task["test"], keep) for keep in KEEP]
        arm.log(accuracy=kept[0], accuracy_at_50=kept[1], accuracy_at_80=kept[2], accuracy_at_90=kept[3], strength=strength)
        arm.curve("accuracy", x=[100 * (1 - keep) for keep in KEEP], y=kept)
        arm.grid("attention", attention_map(model, task["test"][0][:1]))


# --- the estimator


def small_sets(trial: Trial) -> list[tuple[Tensor, float]]:
    """Sets of 9 points in the unit square, from one tight cluster to none, with their exact entropies."""
    draw, sets = trial.generator(), []
    for _ in range(trial.scale(smoke=8, laptop=50)):
        clusters = int(torch.randint(1, 10, (1,), generator=draw))
        centres = torch.rand(clusters, 2, generator=draw)
        x = centres[torch.randint(clusters, (9,), generator=draw)] + 0.08 * torch.randn(9, 2, generator=draw)
        sets.append((x, exact_entropy(x.double().numpy(), RADIUS)))
    return sets


def exact_entropy(x: np.ndarray, radius: float) -> float:
    """min over partitions of the entropy, pieces lying in a disc of that radius; dynamic programme over subsets."""
    n = len(x)
    allowed = np.zeros(1 << n, dtype=bool)
    for centre in disc_centres(x, radius):
        inside = np.flatnonzero(((x - centre) ** 2).sum(1) <= radius**2 + 1e-9)
        allowed[sum(1 << int(i) for i in inside)] = True
    for subset in range((1 << n) - 1, 0, -1):  # every part of an allowed set is allowed
        if allowed[subset]:
            for i in range(n):
                if subset >> i & 1:
                    allowed[subset & ~(1 << i)] = True
    best = np.full(1 << n, np.inf)
    best[0] = 0
    sizes = np.array([bin(s).count("1") for s in range(1 << n)])
    for subset in range(1, 1 << n):
        first = subset & -subset
        rest, part = subset ^ first, subset ^ first
        while True:
            piece = part | first
            if allowed[piece]:
                m = sizes[piece]
                best[subset] = min(best[subset], best[subset ^ piece] + m / n * math.log(n / m))
            if part == 0:
                break
            part = (part - 1) & rest
    return float(best[-1])


def disc_centres(x: np.ndarray, radius: float) -> list[np.ndarray]:
    """Centres of discs that decide which subsets fit: the points, and both discs through every pair."""
    centres = list(x)
    for a, b in combinations(x, 2):
        half = (b - a) / 2
        rest = radius**2 - half @ half
        if rest >= 0:
            normal = np.array([-half[1], half[0]]) / max(np.sqrt(half @ half), 1e-12)
            centres += [a + half + s * np.sqrt(rest) * normal for s in (-1, 1)]
    return centres


def spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(np.round(a, 9), np.round(b, 9)).statistic)


# --- hulls


def family(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n points with extent about 1 around the origin."""
    angle = 2 * np.pi * rng.random(n)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    if name == "square":
        return rng.random((n, 2)) - 0.5
    if name == "gaussian":
        return rng.normal(size=(n, 2)) / 8
    if name == "clustered":
        centres = rng.random((20, 2)) - 0.5
        return centres[rng.integers(20, size=n)] + rng.normal(size=(n, 2)) / 40
    radius = {"disc": np.sqrt(rng.random(n)), "annulus": np.sqrt(0.7 + 0.3 * rng.random(n)), "circle": np.ones(n)}[name]
    return ring * radius[:, None] / 2


def area(p: np.ndarray) -> float:
    x, y = p.T
    return float(0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))


def trained_net(trial: Trial) -> EntropyNet:
    """The net of the largest strength whose mean area error on validation sets is at most 0.002 (else the weakest)."""
    rng = np.random.default_rng(1000 + trial.seed)
    n, steps = trial.scale(smoke=(100, 5), laptop=(400, 120))
    nets = []
    for strength in trial.scale(smoke=(0.1,), laptop=(1.0, 100.0, 10_000.0)):
        torch.manual_seed(trial.seed)
        net = EntropyNet()
        net.entropy.refit(torch.from_numpy(np.concatenate([family(f, 200, rng) for f in FAMILIES])).float())
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for step in range(steps):
            net.entropy.alpha = 50 * 10 ** (step / steps)  # anchors are some 0.2 apart
            x = torch.from_numpy(np.stack([family(f, n, rng) for f in FAMILIES])).float()
            loss = net.loss(x, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors = []
        for f in FAMILIES:
            p = family(f, 2000, rng)
            errors.append(hull_errors(p, moved(net, p))[0])
        nets.append((strength, net, float(np.mean(errors))))
    good = [entry for entry in nets if entry[2] <= 0.002] or nets[:1]
    return good[-1][1]


def moved(net: EntropyNet, p: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(p).float()).double().numpy()


def hull_errors(p: np.ndarray, q: np.ndarray, true: Tensor | None = None) -> tuple[float, float, int, int]:
    """Relative error of the hull's area, Hausdorff distance between the hulls' vertices (of large hulls, a few hundred of them), tests on
    q and vertices of q. ``true``: the hull of p, where it is known."""
    true = instance_optimal_hull(p)[0] if true is None else true
    got, work = instance_optimal_hull(q)
    a, b = p[true.numpy()], q[got.numpy()]
    hausdorff = max(farthest(a[:: len(a) // 500 + 1], b), farthest(b[:: len(b) // 500 + 1], a))
    return abs(area(b) / area(a) - 1), float(hausdorff), work.orientation_tests, len(got)


def farthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).amin(1).max())


def hulls(trial: Trial) -> None:
    from scipy.spatial import ConvexHull

    n = trial.scale(smoke=600, laptop=20_000)
    for arm in trial.arms(*HULLS):
        net = trial.shared("net", lambda: trained_net(trial))
        tests, errors, distances, seconds, qhull = [], [], [], 0.0, 0.0
        for i, name in enumerate(FAMILIES):
            rng = np.random.default_rng((trial.seed, i))
            p = family(name, n, rng)
            start = time.perf_counter()
            if arm.name == "entropynet":
                q = moved(net, p)
            elif arm.name == "jitter":
                shift = moved(net, p) - p
                turn = 2 * np.pi * rng.random(n)
                q = p + np.sqrt((shift**2).sum(1, keepdims=True)) * np.stack([np.cos(turn), np.sin(turn)], 1)
            elif arm.name == "thin":
                q = thinned(p, hull_errors(p, moved(net, p))[0], rng)  # choosing the size costs more than it saves: not in the seconds
                start = time.perf_counter()
            else:
                q = p
            if arm.name == "certified":
                labels = torch.cdist(torch.from_numpy(p).float(), net.entropy.anchors.detach()).argmin(1)
                _, work = instance_optimal_hull(p, labels)
                seconds += time.perf_counter() - start
                tests, errors, distances = [*tests, work.orientation_tests], [*errors, 0.0], [*distances, 0.0]
                continue
            instance_optimal_hull(q)
            seconds += time.perf_counter() - start
            start = time.perf_counter()
            ConvexHull(q)
            qhull += time.perf_counter() - start
            error, distance, count, _ = hull_errors(p, q)
            tests, errors, distances = [*tests, count], [*errors, error], [*distances, distance]
        work = float(np.exp(np.mean(np.log(tests))))
        arm.log(orientation_tests=work, tests=tests, area_error=float(np.mean(errors)), errors=errors, hausdorff=float(np.max(distances)))
        arm.log_timed(hull_wall=seconds, qhull_wall=qhull)


def thinned(p: np.ndarray, allowed: float, rng: np.random.Generator) -> np.ndarray:
    """A random subset, the smallest of a halving sequence whose area error is within what the net has."""
    order, size, true = rng.permutation(len(p)), len(p), instance_optimal_hull(p)[0]
    while size > 16 and hull_errors(p, p[order[: size // 2]], true)[0] <= max(allowed, 1e-4):
        size //= 2
    return p[order[:size]]


# --- attention


class SegmentReader(nn.Module):
    """Tokens (n, 65) -> logits: embeddings with positions, two transformer layers, read at the query."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS + SEGMENTS, width)
        self.places = nn.Parameter(0.5 * torch.randn(SEGMENTS * SIZE + 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(tokens) + self.places)[:, -1])


def majority(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of 64 symbols and a query, and the most frequent symbol of the segment that it names; ties are drawn again."""
    x = torch.randint(SYMBOLS, (2 * n + 64, SEGMENTS * SIZE), generator=draw)
    query = torch.randint(SEGMENTS, (len(x),), generator=draw)
    counts = functional.one_hot(x.view(-1, SEGMENTS, SIZE)[torch.arange(len(x)), query], SYMBOLS).sum(1)
    top = counts.topk(2, 1).values
    clear = torch.nonzero(top[:, 0] > top[:, 1]).squeeze(1)[:n]
    return torch.cat([x, SYMBOLS + query[:, None]], 1)[clear], counts.argmax(1)[clear]


def majority_task(trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(10_000 + trial.seed)
    n = trial.scale(smoke=100, laptop=600)
    return {"val": majority(n, draw), "test": majority(n, draw)}


def pretrained(trial: Trial) -> nn.Module:
    model = SegmentReader()
    steps = trial.scale(smoke=4, laptop=300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(trial.seed)
    for _ in range(steps):
        x, y = majority(64, draw)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def penalty(name: str, call: AttentionCall) -> Tensor:
    if name == "l1_logits":
        return call.scores.abs().mean()
    if name == "row_entropy":
        return torch.special.entr(call.weights.clamp_min(1e-30)).sum(-1).mean()
    return call.penalty


def finetuned(name: str, strength: float, start: nn.Module, task: dict, trial: Trial) -> nn.Module:
    """Train on with the penalty ramped in over the first half."""
    rule = range_entropy_attention(size=SIZE, ranges=8 if name == "range_balls" else None)
    torch.manual_seed(trial.seed)
    model = replace_layers(copy.deepcopy(start), rule)
    steps = trial.scale(smoke=2, laptop=40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(20_000 + trial.seed)
    for step in range(steps):
        x, y = majority(64, draw)
        with attention_calls() as calls:
            loss = functional.cross_entropy(model(x), y)
        if strength:
            loss = loss + strength * min(1.0, 2 * step / steps) * sum(penalty(name, call) for call in calls) / len(calls)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor], keep: float = 1.0) -> float:
    for module in model.modules():
        if hasattr(module, "keep"):
            module.keep = keep
    with torch.no_grad():
        found = (model.eval()(part[0]).argmax(1) == part[1]).float().mean().item()
    for module in model.modules():
        if hasattr(module, "keep"):
            module.keep = 1.0
    model.train()
    return found


def attention_map(model: nn.Module, x: Tensor) -> Tensor:
    """Rows: head by head of both layers, what the query looks at."""
    with torch.no_grad(), attention_calls() as calls:
        model(x)
    return torch.cat([call.weights[0, :, -1] for call in calls])


def figure(record: RecordView, fig: matplotlib.figure.Figure) -> None:
    """The estimator, hull work against error, accuracy against sparsity, and what the query looks at."""
    fig.set_size_inches(11, 7.5)
    fig.set_layout_engine("constrained")
    (rank, work), (sparse, look) = fig.subplots(2, 2)
    colours = ["#000000", "#D55E00", "#E69F00", "#0072B2", "#009E73"]

    for x, y in record.curves("ball_10", "estimates"):
        rank.plot(x, y, "o", color="#0072B2", alpha=0.4, ms=5)
    rank.axline((0, 0), slope=1, color="grey", lw=1)
    rho = {arm: record.mean(arm, "spearman") for arm in SHARPNESS if arm in record.arms}
    text = "\n".join(f"alpha r² = {SHARPNESS[arm]:g}: {value:.2f}" for arm, value in rho.items())
    rank.text(0.03, 0.97, f"rank correlation\n{text}", transform=rank.transAxes, va="top", fontsize=8)
    rank.set(xlabel="exact range entropy (nats)", ylabel="surrogate, alpha r² = 10", title="The estimator, 9 points a set")

    for arm, colour in zip(HULLS, colours):
        tests, errors = record.values(arm, "tests"), record.values(arm, "errors")
        base = record.values("raw", "tests")
        for i in range(len(FAMILIES)):
            x, y = max(100 * errors[:, i].mean(), 1e-4), (tests[:, i] / base[:, i]).mean()
            work.plot(x, y, "osDv^P"[i], color=colour, ms=7, mec="white", label=None)
        work.plot([], [], "o", color=colour, label=arm)
    for i, name in enumerate(FAMILIES):
        work.plot([], [], "osDv^P"[i], color="grey", label=name)
    work.axhline(0.5, color="grey", ls=":", lw=1)
    work.axvline(0.2, color="grey", ls=":", lw=1)
    work.set(xscale="log", yscale="log", xlabel="area error (%)", ylabel="orientation tests / raw", title="Hulls: the lower left is wanted")
    work.legend(fontsize=7, ncols=2)

    for arm, colour in zip(PENALTIES, colours):
        curves = record.curves(arm, "accuracy")
        x, y = np.asarray(curves[0][0], float), 100 * np.array([c[1] for c in curves])
        sparse.errorbar(x, y.mean(0), yerr=y.std(0), fmt="o-", color=colour, capsize=2, label=arm.replace("_", " "))
    sparse.set(xlabel="attention removed (%)", ylabel="test accuracy (%)", title="Segment majority, largest weights kept")
    sparse.legend(fontsize=8)

    look.imshow(np.concatenate([record.grids(arm, "attention")[0] for arm in ("none", "range_entropy")]), aspect="auto", cmap="viridis")
    look.axhline(7.5, color="white")
    for i in range(1, SEGMENTS):
        look.axvline(i * SIZE - 0.5, color="white", lw=0.5)
    look.set(xlabel="position (segments marked)", yticks=[3.5, 11.5], yticklabels=["none", "range entropy"])
    look.set_title("What the query looks at, 8 heads (first seed)")
