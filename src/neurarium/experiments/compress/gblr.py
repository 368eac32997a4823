"""Gaudi-GBLR against fixed structures of the same cost: a planted matrix, and a small character GPT trained from scratch.

*Planted*: a 64 x 64 matrix that is the sum of three rank-one boxes, learned from input-output pairs. The baselines get the matrix itself
and are its best approximations within their family, at no less cost: truncated SVD, a block diagonal, and low rank in each block of a
4 x 4 grid with the ranks where they help most.

*GPT*: every linear map of the blocks is of one family: low rank, block diagonal, low rank in a 4 x 4 grid, or learned. The learned
structure may cost in all what the low-rank one costs; who gets how much of it is left to the training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from neurarium.compress import GPT, GaudiGBLR, LowRankLinear, gblr, low_rank, pack_blocks
from neurarium.compress.factor.lowrank import GroupedLinear
from neurarium.experiments.compress.zoo import gpt as trained_gpt
from neurarium.experiments.compress.zoo import next_token_loss
from neurarium.learn.fit import Backprop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab import RecordView, Trial

SHARES = {"": 0.25, "_small": 0.16}
CONTEXT = 32


def run(trial: Trial) -> None:
    planted(trial)
    language(trial)


def planted(trial: Trial) -> None:
    draw = torch.Generator().manual_seed(trial.seed)
    matrix, cost = boxes(draw)
    x = torch.randn(256, 64, generator=draw)
    for arm in trial.arms("planted_gblr", "planted_lowrank", "planted_blocks", "planted_blr"):
        if arm.name == "planted_gblr":
            steps = trial.scale(smoke=40, laptop=1500)
            model = nn.Sequential(nn.Linear(64, 64, bias=False))
            result = gblr(
                model, [(x, x @ matrix.T)] * steps, budget=cost / matrix.numel(), components=8, init="dense", learn=0.8, sigma=(8.0, 100.0),
                structure_lr=2e-3, loss="mse", seed=trial.seed,
                optimizer=partial(AdamW, lr=0.02, weight_decay=0.0), schedule=partial(one_cycle, steps=steps),
            )[0]  # fmt: skip
            found, spent = result.eval().weight.detach(), result.cost()
        else:
            found, spent = {"planted_lowrank": by_rank, "planted_blocks": by_blocks, "planted_blr": by_grid}[arm.name](matrix, cost)
        arm.log(fit_error=float((found - matrix).norm() / matrix.norm()), cost=spent / cost)
        arm.grid("weight", found)
        if arm.name == "planted_gblr":
            arm.grid("truth", matrix)


def boxes(draw: torch.Generator) -> tuple[Tensor, int]:
    """Three rank-one boxes at random places, and how many numbers describe them."""
    matrix, cost = torch.zeros(64, 64), 0
    for _ in range(3):
        a, b = torch.randint(12, 29, (2,), generator=draw).tolist()
        top, left = (int(torch.randint(0, 65 - n, (), generator=draw)) for n in (a, b))
        matrix[top : top + a, left : left + b] += torch.outer(torch.randn(a, generator=draw), torch.randn(b, generator=draw))
        cost += a + b
    return matrix, cost


def by_rank(matrix: Tensor, cost: int) -> tuple[Tensor, int]:
    rank = -(-cost // 128)
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], 128 * rank


def by_blocks(matrix: Tensor, cost: int) -> tuple[Tensor, int]:
    count = max(g for g in (1, 2, 4, 8, 16, 32, 64) if 4096 // g >= cost)
    mask = torch.block_diag(*[torch.ones(64 // count, 64 // count)] * count)
    return matrix * mask, 4096 // count


def by_grid(matrix: Tensor, cost: int) -> tuple[Tensor, int]:
    parts = matrix.view(4, 16, 4, 16).transpose(1, 2)  # (4, 4, 16, 16)
    u, s, vh = torch.linalg.svd(parts)
    units = -(-cost // 32)
    kept = torch.zeros(s.numel())
    kept[s.flatten().argsort(descending=True, stable=True)[:units]] = 1
    return ((u * (s * kept.view(s.shape))[..., None, :]) @ vh).transpose(1, 2).reshape(64, 64), 32 * units


def language(trial: Trial) -> None:
    steps = trial.scale(smoke=8, laptop=250)
    texts = trial.shared("texts", lambda: _texts(trial, steps))
    layers: dict[str, Callable[[nn.Linear, float], nn.Module]] = {
        "lowrank": lambda layer, share: low_rank(layer, int(share * layer.weight.numel() / sum(layer.weight.shape))),
        "blocks": lambda layer, share: GroupedLinear(layer.in_features, layer.out_features, round(1 / share)),
        "blr": grid,
    }
    for arm in trial.arms("dense", "lowrank", "gblr", "blocks", "blr", "lowrank_small", "gblr_small"):
        family, _, size = arm.name.partition("_")
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = GPT(texts["vocabulary"], width=trial.scale(smoke=16, laptop=64), heads=4, layers=2, context=CONTEXT)
        settings = {"optimizer": partial(AdamW, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05),
                    "schedule": partial(one_cycle, steps=steps), "loss": next_token_loss}  # fmt: skip
        dense = {n: m.weight.numel() for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
        if family == "gblr":
            share = trial.metric(f"lowrank{'_' * bool(size)}{size}", "share")
            model = gblr(model, texts["loader"], budget=share, seed=trial.seed, **settings)
        else:
            if family != "dense":
                replace(model.blocks, partial(layers[family], share=SHARES[f"{'_' * bool(size)}{size}"]))
            Backprop(**settings).fit(model, texts["loader"], epochs=1, seed=trial.seed)
        kept = [cost(model.blocks.get_submodule(n)) for n in dense]
        shares = torch.tensor(kept) / torch.tensor(list(dense.values()))
        arm.log(loss=held_out(model, texts["test"]), share=sum(kept) / sum(dense.values()), share_std=float(shares.std()), packed_error=0.0
                if family != "gblr" else packed_error(model, texts["test"][0]))  # fmt: skip
        arm.curve("shares", y=shares.tolist())
        if arm.name == "gblr":
            layer = model.blocks[0].up.eval()
            rows, columns = (m.detach() for m in layer.masks())
            arm.grid("blocks", rows.T @ columns)


def _texts(trial: Trial, steps: int) -> dict:
    source = trained_gpt(trial)
    start = torch.randint(len(source.train) - CONTEXT - 1, (steps, 16), generator=torch.Generator().manual_seed(trial.seed))
    windows = source.train[start[..., None] + torch.arange(CONTEXT + 1)]
    rows = min(trial.scale(smoke=32, laptop=500), (len(source.test) - 1) // CONTEXT)
    test = tuple(source.test[i : i + rows * CONTEXT].reshape(rows, CONTEXT) for i in (0, 1))
    return {"loader": [(w[:, :-1], w[:, 1:]) for w in windows], "test": test, "vocabulary": source.model.token.num_embeddings}


def one_cycle(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Ten percent warm-up, then a cosine to zero, for each group's own rate."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm))))

    return LambdaLR(optimizer, factor)


def grid(layer: nn.Linear, share: float) -> GaudiGBLR:
    """Low rank in each block of a 4 x 4 grid, as a GaudiGBLR of fixed structure, started from the layer's own blocks."""
    n, m = layer.weight.shape
    rank = max(1, int(share * n * m / (4 * (n + m))))
    result = GaudiGBLR(m, n, 16, rank, sigma=None)
    at = torch.arange(16)
    with torch.no_grad():
        for p, value in zip(result.structure(), (0.25, at // 4 / 4, 0.25, at % 4 / 4), strict=True):
            p.copy_(torch.as_tensor(value))
        result.u.zero_(), result.v.zero_(), result.bias.copy_(layer.bias)
        for i in range(16):
            a, b = (slice(k * size // 4, (k + 1) * size // 4) for k, size in ((i // 4, n), (i % 4, m)))
            u, s, vh = torch.linalg.svd(layer.weight[a, b], full_matrices=False)
            result.u[i, :, a], result.v[i, :, b] = (u[:, :rank] * s[:rank].sqrt()).T, s[:rank].sqrt()[:, None] * vh[:rank]
    for p in result.structure():
        p.requires_grad_(False)
    return result


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear:
                parent._modules[name] = make(child)


def cost(layer: nn.Module) -> int:
    """Stored weights without the bias."""
    if isinstance(layer, GaudiGBLR):
        return layer.cost()
    if isinstance(layer, LowRankLinear):
        return layer.first.weight.numel() + layer.second.weight.numel()
    return layer.weight.numel()


@torch.no_grad()
def held_out(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    model.eval()
    return float(next_token_loss(model(test[0]), test[1]))


@torch.no_grad()
def packed_error(model: nn.Module, ids: Tensor) -> float:
    return float((pack_blocks(model.eval())(ids) - model(ids)).abs().max())


def figure(record: RecordView, fig: Figure) -> None:
    fig.set_size_inches(10, 5.6)
    grid = fig.add_gridspec(2, 4)
    axes = {(i, j): fig.add_subplot(grid[i, j]) for i in range(2) for j in range(4) if i == 0 or j > 1}
    panels = {"planted_gblr": "Gaudi-GBLR", "planted_lowrank": "low rank", "planted_blr": "low rank in blocks"}
    truth = record.grids("planted_gblr", "truth")[0]
    bound = abs(truth).max()
    axes[0, 0].imshow(truth, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes[0, 0].set_title("planted matrix", fontsize=9)
    for ax, (arm, label) in zip((axes[0, j] for j in (1, 2, 3)), panels.items(), strict=True):
        ax.imshow(record.grids(arm, "weight")[0], cmap="RdBu_r", vmin=-bound, vmax=bound)
        ax.set_title(f"{label}: error {record.mean(arm, 'fit_error'):.2f}", fontsize=9)
    for j in range(4):
        axes[0, j].set(xticks=(), yticks=())
    labels = {"dense": "dense", "lowrank": "low rank", "blr": "low rank\nin blocks", "blocks": "block\ndiagonal", "gblr": "Gaudi-\nGBLR"}
    colours = ("#999999", "#56B4E9", "#009E73", "#E69F00", "#0072B2")
    bars = fig.add_subplot(grid[1, :2])
    for i, (arm, colour) in enumerate(zip(labels, colours, strict=True)):
        values = record.values(arm, "loss")
        bars.errorbar(i, values.mean(), values.std(ddof=1) if len(values) > 1 else 0, color=colour, marker="o", capsize=3)
        bars.annotate(f"{100 * record.mean(arm, 'share'):.0f} %", (i, values.mean()), xytext=(7, 0), textcoords="offset points", fontsize=8)
    bars.set_xticks(range(len(labels)), labels.values(), fontsize=8)
    bars.set(ylabel="nats a character", title="Character GPT (number: weights kept)", xlim=(-0.5, len(labels) - 0.3))
    bars.title.set_fontsize(9)
    shares = record.curves("gblr", "shares")[0][1]
    axes[1, 2].bar(range(len(shares)), [100 * s for s in shares], color="#0072B2")
    axes[1, 2].axhline(100 * record.mean("gblr", "share"), color="black", linewidth=0.8, linestyle=":")
    axes[1, 2].set(xlabel="linear layer", ylabel="weights kept (%)")
    axes[1, 2].set_title("each layer's own share", fontsize=9)
    axes[1, 3].imshow(record.grids("gblr", "blocks")[0], cmap="viridis", aspect="auto")
    axes[1, 3].set_title("blocks that overlap, one layer", fontsize=9)
    axes[1, 3].set(xticks=(), yticks=())
