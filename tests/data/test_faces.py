from __future__ import annotations

import pytest
import torch

from neurarium.data import synthetic_faces
from neurarium.errors import BadInput


def test_images_are_seeded_and_do_not_depend_on_their_number() -> None:
    a, b, c = synthetic_faces(30, 10, size=16), synthetic_faces(300, 20, size=16), synthetic_faces(30, 10, size=16, seed=1)
    assert torch.equal(a.train.x, b.train.x[:30])
    assert torch.equal(a.train.y, b.train.y[:30])
    assert not torch.equal(a.train.x, c.train.x)
    assert a.train.x.shape == (30, 1, 16, 16)
    assert a.train.y.shape == (30, 64)
    assert 0 <= a.train.x.min() < 0.3 < 0.7 < a.train.x.max() <= 1


def test_the_points_are_where_the_features_are() -> None:
    task = synthetic_faces(1, 100, size=64)
    x, y = task.test.x[:, 0], task.test.y.view(-1, 32, 2)
    assert (y.abs() < 0.5).float().mean() > 0.97

    def brightness(points: torch.Tensor) -> torch.Tensor:
        at = ((points + 0.5) * 64).long().clamp(0, 63)
        return x[torch.arange(len(x)), at[:, 1], at[:, 0]]

    iris, white = y[:, [15, 17]].mean(1), 0.2 * y[:, 17] + 0.8 * y[:, 15]
    cheek, outside = y[:, [23, 7]].mean(1), 1.25 * y[:, 4] - 0.25 * y[:, 24]
    assert (brightness(iris) < brightness(cheek)).float().mean() > 0.85
    assert (brightness(white) > brightness(iris)).float().mean() > 0.75
    assert (brightness(outside) < brightness(cheek)).float().mean() > 0.85


def test_only_training_points_have_noise_and_the_error_is_in_eye_distances() -> None:
    exact, noisy = synthetic_faces(250, 5, size=8, noise=0.0), synthetic_faces(250, 5, size=8, noise=1.0)
    assert float((noisy.train.y - exact.train.y).std()) == pytest.approx(1 / 48, rel=0.05)
    assert torch.equal(exact.test.y, noisy.test.y)
    y = exact.train.y[:3]
    eyes = (y.view(3, 32, 2)[:, 15] - y.view(3, 32, 2)[:, 21]).norm(dim=1)
    shifted = y + torch.tensor([0.03, 0.04]).repeat(32)
    torch.testing.assert_close(exact.nme(shifted, y), 0.05 / eyes)
    for bad in ({"train": 0}, {"size": 4}, {"noise": -1.0}):
        with pytest.raises(BadInput):
            synthetic_faces(**bad)
