"""The data sets themselves: embedded ones always, the others where a mirror folder holds them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from scipy import signal

from neurarium import data
from neurarium.errors import BadInput

mirror = pytest.mark.skipif(not os.environ.get("NEURARIUM_DATA"), reason="NEURARIUM_DATA is not set: no mirror folder to read from")


def test_digits() -> None:
    task = data.images("digits")
    assert task.shape == (1, 8, 8)
    assert (len(task.train), len(task.test), task.classes) == (1437, 360, 10)
    assert task.train.x.dtype == torch.float32
    assert task.train.x.min() == 0.0
    assert task.train.x.max() == 1.0
    both = torch.cat([task.train.x, task.test.x]).flatten(1)
    from sklearn.datasets import load_digits

    theirs = np.sort(load_digits().data.sum(1))
    assert np.allclose(np.sort(both.sum(1).numpy() * 16.0), theirs)


def test_subsets_are_stratified_seeded_and_resized_by_area() -> None:
    a, b, c = (data.images("digits", train=200, test=50, size=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.train.x, b.train.x)
    assert not torch.equal(a.train.x, c.train.x)
    assert a.train.y.bincount().tolist() == pytest.approx([20] * 10, abs=1)
    whole = data.images("digits", train=200, test=50, seed=1)
    assert torch.allclose(whole.train.x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), a.train.x)
    assert torch.equal(data.images("digits", seed=5).test.x, data.images("digits", seed=6).test.x)


@pytest.mark.parametrize(("name", "classes", "shape"), [("iris", 3, 4), ("wine", 3, 13), ("breast_cancer", 2, 30), ("diabetes", None, 10)])
def test_tables_are_standardised_on_the_training_rows_only(name: str, classes: int | None, shape: int) -> None:
    task = data.tabular(name, seed=1)
    assert task.classes == classes
    assert task.train.x.shape[1] == shape == len(task.columns)
    assert torch.allclose(task.train.x.mean(0), torch.zeros(shape), atol=1e-5)
    assert torch.allclose(task.train.x.std(0, correction=0), torch.ones(shape), atol=1e-4)
    assert task.test.x.mean(0).abs().max() > 1e-3
    assert not torch.equal(task.test.x, data.tabular(name, seed=2).test.x)
    if classes is None:
        assert task.train.y.shape == (len(task.train), 1)
        assert task.train.y.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
        assert 50 < (task.test.y * task.target_std + task.target_mean).mean() < 300


def test_arma_has_the_autocovariance_of_its_process() -> None:
    # ARMA(1, 1): gamma_0 = (1 + 2 a m + m^2) / (1 - a^2), gamma_1 = (1 + a m)(a + m) / (1 - a^2), times the noise variance
    a, m, s = 0.7, 0.4, 2.0
    y = data.arma([a], [m], 400_000, noise=s, seed=3).numpy()
    gamma = [float((y[: len(y) - k] * y[k:]).mean()) for k in range(3)]
    exact = [(1 + 2 * a * m + m * m) / (1 - a * a), (1 + a * m) * (a + m) / (1 - a * a)]
    assert gamma[:2] == pytest.approx([g * s * s for g in exact], rel=0.02)
    assert gamma[2] == pytest.approx(a * gamma[1], rel=0.02)


def test_arma_starts_stationary_and_obeys_its_recursion() -> None:
    first = torch.stack([data.arma([0.95], [], 1, seed=s) for s in range(400)])
    assert first.var().item() == pytest.approx(1 / (1 - 0.95**2), rel=0.25)
    y = data.arma([0.5, -0.3], [], 5000, seed=0).numpy()
    e = signal.lfilter([1.0, -0.5, 0.3], [1.0], y)[2:]
    assert abs(np.corrcoef(e[1:], e[:-1])[0, 1]) < 0.05
    assert torch.equal(data.arma([0.5], [0.2], 50, seed=4), data.arma([0.5], [0.2], 50, seed=4))


@pytest.mark.parametrize("ar", [[1.0], [1.5], [0.5, 0.6], [float("nan")], [0.0, -1.01]])
def test_arma_refuses_what_is_not_stationary(ar: list[float]) -> None:
    with pytest.raises(BadInput):
        data.arma(ar, [], 10)


def test_photos_are_embedded() -> None:
    pictures = data.photos()
    assert pictures["astronaut"].shape == (3, 512, 512)
    assert pictures["camera"].shape == (1, 512, 512)
    assert all(p.dtype == torch.float32 and p.min() >= 0 and p.max() <= 1 for p in pictures.values())


def test_the_registry_answers_for_every_set() -> None:
    assert {"digits", "iris", "wine", "breast_cancer", "diabetes", "scikit-image"} <= set(data.available())
    for name in data.SETS:
        assert str(data.where(name))
    assert data.where("digits") == data.get("digits") == "embedded in scikit-learn"
    with pytest.raises(BadInput, match="did you mean 'cifar10'"):
        data.images("cifar-10")
    with pytest.raises(BadInput, match="no data set 'iris' for images"):
        data.images("iris")


@mirror
def test_mnist() -> None:
    task = data.images("mnist")
    assert task.shape == (1, 28, 28)
    assert (len(task.train), len(task.test)) == (60_000, 10_000)
    assert task.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # the published order
    assert task.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert task.train.x.mean().item() == pytest.approx(0.1307, abs=1e-4)  # the constants that everybody normalises by
    assert task.train.x.std().item() == pytest.approx(0.3081, abs=1e-4)


@mirror
@pytest.mark.parametrize(
    ("name", "nodes", "features", "edges", "classes"), [("cora", 2708, 1433, 10_556, 7), ("citeseer", 3327, 3703, 9_104, 6)]
)
def test_planetoid(name: str, nodes: int, features: int, edges: int, classes: int) -> None:
    task = data.graph(name)
    assert task.x.shape == (nodes, features)
    assert task.edge_index.shape == (2, edges)
    source, target = task.edge_index
    assert not (source == target).any()
    codes = source * nodes + target
    assert len(codes.unique()) == edges
    assert torch.equal(codes, (target * nodes + source).sort().values)  # each edge both ways
    assert [int(m.sum()) for m in (task.train_mask, task.val_mask, task.test_mask)] == [20 * classes, 500, 1000]
    assert task.y[task.train_mask].bincount().tolist() == [20] * classes
    assert not (task.train_mask & task.val_mask).any()
    assert not (task.test_mask & (task.train_mask | task.val_mask)).any()
    if name == "cora":  # homophily of the published graph
        assert (task.y[source] == task.y[target]).float().mean().item() == pytest.approx(0.81, abs=0.005)
    else:
        assert int((task.x[2312:].sum(1) == 0).sum()) == 15  # the isolated test nodes that the files lack


@mirror
def test_series_text_audio_and_uci() -> None:
    task = data.series("etth1")
    assert task.values.shape == (17_420, 7)
    assert task.column("OT")[0].item() == pytest.approx(30.531, abs=1e-3)
    assert len(data.text("tiny-shakespeare").characters) == 65
    spam = data.text("sms-spam", seed=1)
    share = [(p.labels == 1).float().mean().item() for p in (spam.train, spam.valid, spam.test)]  # type: ignore[union-attr]
    assert share == pytest.approx([0.134] * 3, abs=0.003)
    assert not set(spam.train.documents[:50]) - set(data.text("sms-spam", seed=1).train.documents)
    assert sum(len(p) for p in (spam.train, spam.valid, spam.test)) == pytest.approx(5573, abs=1)
    text = "To be, or not"
    assert data.text("tiny-shakespeare").decode(data.text("tiny-shakespeare").encode(text)) == text
    assert data.tabular("concrete").train.x.shape == (824, 8)
    spoken = data.audio("spoken-digits")
    assert (len(spoken.train), len(spoken.test), len(spoken.speakers)) == (2700, 300, 6)
    assert spoken.test.y.bincount().tolist() == [30] * 10
    assert 0.1 < spoken.train.x.abs().max() <= 1.0
    assert len(data.photos("set12")) == 12
