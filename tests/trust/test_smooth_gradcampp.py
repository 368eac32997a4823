"""The paper smooth-gradcampp as a whole: its contract, its generator, its experiment."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from neurarium import catalog, data
from neurarium.experiments.trust import smooth_gradcampp as experiment
from neurarium.lab import Trial
from neurarium.testing import check_method
from neurarium.testing.examples import trust


def test_the_probe_keeps_its_contract() -> None:
    assert "reads_only" in check_method(trust.smooth_gradcampp())


def test_scattered_digits_are_seeded_apart_and_labelled() -> None:
    digits = data.images("digits", size=experiment.TILE).test
    canvases, again = (experiment.scatter(digits, 40, [3, 0]) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(canvases, again, strict=True))
    assert not torch.equal(canvases.x, experiment.scatter(digits, 40, [3, 1]).x)
    count = canvases.objects.flatten(2).any(2).sum(1)
    assert set(count.tolist()) == {1, 2, 3}
    assert (canvases.objects.sum(1) <= 1).all()  # boxes do not overlap
    assert (canvases.objects.sum((1, 2, 3)) == count * experiment.TILE**2).all()
    assert (canvases.labels.sum(1) == 3).all()  # the class itself and two others
    assert (canvases.labels.gather(1, canvases.target[:, None]) == 1).all()
    for i, j in itertools.product(range(40), range(experiment.MOST)):
        if canvases.objects[i, j].any():
            assert canvases.x[i, 0][canvases.objects[i, j]].amax() > 0.5  # something is in every box


def test_auroc_counts_pairs() -> None:
    logits, labels = torch.tensor([[0.9], [0.2], [0.5], [0.1]]), torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    assert abs(experiment.auroc(logits, labels) - 2 / 3) < 1e-6


def test_the_experiment_runs_through_and_measures_what_is_claimed() -> None:
    trial = Trial(seed=0)
    experiment.run(trial)
    assert {run.status for run in trial.runs.values()} == {"done"}
    assert set(trial.runs) == set(experiment.ARMS)
    (paper,) = [p for p in catalog.load() if p.id == "smooth-gradcampp"]
    for claim in paper.claims:
        for word in claim.measure.replace("-", " ").replace("/", " ").split():
            arm, metric = word.split(".")
            assert np.isfinite(trial.runs[arm].metrics[metric])
