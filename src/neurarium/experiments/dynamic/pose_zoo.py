"""The pose task, the network trained on it, and the training that every way of thinning it out gets: shared by HoT and H2OT."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neurarium.data import PoseTask, pose_sequences
from neurarium.dynamic import decoder, pose
from neurarium.dynamic.pose import VideoPoseTransformer, mpjpe, pose_loss
from neurarium.dynamic.tokens import kept_frames
from neurarium.experiments.dynamic.zoo import train, trained
from neurarium.meter import flops, latency

if TYPE_CHECKING:
    from neurarium.lab import Trial

__all__ = [
    "FINETUNING", "PRETRAINING", "finetune", "finetuned", "frames_per_second", "host", "judge", "poses", "same_cost", "share_of_fast",
    "untrained",
]  # fmt: skip

PRETRAINING, FINETUNING = 15, 15  # epochs
RATE, BATCH = 8e-3, 16
ROWS = 32  # sequences at once where speed is measured


def poses(trial: Trial) -> PoseTask:
    """480 training and 100 test sequences of 54 frames (32, 16 and 18 at the scale smoke)."""
    train, test, frames = trial.scale(smoke=(32, 16, 18), laptop=(480, 100, 54))
    return pose_sequences(train, test, frames=frames, seed=trial.seed)


def untrained(trial: Trial, task: PoseTask, **options: Any) -> VideoPoseTransformer:
    """One token a frame; five blocks of width 64 (four of width 16 at the scale smoke)."""
    width, depth = trial.scale(smoke=(16, 4), laptop=(64, 5))
    return VideoPoseTransformer(task.frames, task.joints, width, **{"depth": depth, "heads": 4, "joint_tokens": False, **options})


def finetune(trial: Trial, task: PoseTask, model: nn.Module, epochs: int = FINETUNING) -> nn.Module:
    """AdamW with one cycle of the learning rate, the same for all, in place; eval mode after."""
    batches = task.train.to(trial.device).batches(BATCH, seed=trial.seed)
    epochs = trial.scale(smoke=1, laptop=epochs)
    return train(model.to(trial.device), batches, epochs=epochs, lr=RATE, loss=pose_loss, seed=trial.seed, clip=1.0)


def host(trial: Trial, task: PoseTask) -> nn.Module:
    """The full transformer after its training: what every arm starts from."""
    return _kept("pose", trial, task, partial(untrained, trial, task), PRETRAINING)


def finetuned(trial: Trial, task: PoseTask, epochs: int = FINETUNING) -> nn.Module:
    """The full transformer, trained on for as long as the arms are."""
    return _kept("pose-on", trial, task, lambda: host(trial, task), epochs)


def _kept(name: str, trial: Trial, task: PoseTask, make: Callable[[], nn.Module], epochs: int) -> nn.Module:
    def fit(model: nn.Module) -> None:
        finetune(trial, task, model, epochs)

    def build() -> nn.Module:
        return make()

    code = "".join(map(inspect.getsource, (decoder, pose)))
    mark = {"shape": list(task.train.x.shape), "sum": float(task.train.x.double().sum()), "epochs": epochs, "rate": RATE, "batch": BATCH}
    return trained(name, trial, build, fit, code=hashlib.sha256(code.encode()).hexdigest(), **mark)


@torch.no_grad()
def judge(model: nn.Module, task: PoseTask) -> dict[str, float]:
    """Errors on the test sequences, over all frames and over slow and fast ones, and FLOPs a sequence."""
    device = next(model.parameters()).device
    x, y, fast = task.test.x.to(device), task.test.y.to(device), (task.test_speed > 1).to(device)
    out = model.eval()(x)
    return {
        "mpjpe": float(mpjpe(out, y)),
        "mpjpe_fast": float(mpjpe(out[fast], y[fast])),
        "mpjpe_slow": float(mpjpe(out[~fast], y[~fast])),
        "flops": float(flops(model, x[:1])),
    }


@torch.no_grad()
def share_of_fast(model: nn.Module, task: PoseTask) -> float:
    """The share of fast frames among those kept over their share among all."""
    kept = kept_frames(model, task.test.x.to(next(model.parameters()).device)).cpu()
    fast = (task.test_speed > 1).double()
    return float(fast.gather(1, kept).mean() / fast.mean())


def same_cost(make: Callable[[int], nn.Module], target: float, x: torch.Tensor, counts: range) -> int:
    """The largest of ``counts`` for which what ``make`` gives costs at most ``target`` FLOPs a sequence; the cost rises with the count."""
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if flops(make(counts[middle]), x[:1]) <= target else (low, middle - 1)
    return counts[low]


def frames_per_second(models: Mapping[str, nn.Module], task: PoseTask, repeats: int = 15) -> dict[str, float]:
    """Of each model on batches of ``ROWS`` sequences, one after another in turn so that a busy moment strikes all."""
    device = next(next(iter(models.values())).parameters()).device
    x = task.test.x[:ROWS].to(device)
    with torch.inference_mode():
        timings = latency({name: partial(model.eval(), x) for name, model in models.items()}, repeats=repeats, warmup=2)
    return {name: len(x) * task.frames / timing.median for name, timing in timings.items()}
