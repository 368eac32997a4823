"""CHITA beside plain magnitude and the optimal-brain-surgeon baseline: seconds and accuracy of one pruning of one trained network.

    pytest benchmarks/compress --benchmark-disable-gc -s
"""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from neurarium import data
from neurarium.compress import chita, magnitude, woodfisher
from neurarium.experiments.compress.zoo import accuracy, mlpnet

SPARSITY, SAMPLES = 0.95, 500


@pytest.fixture(scope="module")
def trained():
    task = data.images("mnist", train=20_000, seed=0)
    return task, mlpnet(task, epochs=3), [(task.train.x[:SAMPLES], task.train.y[:SAMPLES])]


def test_chita_against_magnitude_and_obs(trained) -> None:
    torch.set_num_threads(1)
    task, model, calibration = trained
    methods = {
        "magnitude": partial(magnitude, sparsity=SPARSITY),
        "OBS (WoodFisher)": partial(woodfisher, loader=calibration, sparsity=SPARSITY, samples=SAMPLES),
        "CHITA, back-solve": partial(chita, loader=calibration, sparsity=SPARSITY, samples=SAMPLES, method="bso"),
        "CHITA": partial(chita, loader=calibration, sparsity=SPARSITY, samples=SAMPLES),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    pruned = {}
    for _ in range(4):  # in turn, so that a drift of the machine meets all of them; the first round warms up
        for name, method in methods.items():
            began = time.perf_counter()
            pruned[name] = method(model)
            seconds[name].append(time.perf_counter() - began)
    median = {name: sorted(s[1:])[1] for name, s in seconds.items()}
    print(f"\n{'method':20} {'seconds':>9} {'to OBS':>7} {'accuracy':>9}   (32,360 weights, {SPARSITY:.0%} removed, {SAMPLES} gradients)")
    for name, result in pruned.items():
        ratio = median[name] / median["OBS (WoodFisher)"]
        print(f"{name:20} {median[name]:>9.3f} {ratio:>7.2f} {accuracy(result, task):>9.3f}")
    assert accuracy(pruned["CHITA"], task) > accuracy(pruned["OBS (WoodFisher)"], task)
