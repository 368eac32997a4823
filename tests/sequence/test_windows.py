"""Windows leak nothing; errors and tests of forecasts have their textbook values."""

import math

import pytest
import torch

from neurarium.errors import BadInput
from neurarium.sequence.accuracy import diebold_mariano, directional_accuracy, mae, mase, rmse, seasonal_naive, smape
from neurarium.sequence.windows import Scaler, Windows


def test_windows_are_consecutive_values_without_copies():
    series = torch.arange(10.0)
    windows = Windows(series, 3, 2, stride=2)
    assert windows.x.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert windows.y.tolist() == [[3, 4], [5, 6], [7, 8]]
    assert windows.x.untyped_storage().data_ptr() == series.untyped_storage().data_ptr()
    assert len(windows) == 3
    assert windows[1][1].tolist() == [5, 6]
    both = Windows(torch.stack([series, -series], 1), 3, 2)
    assert both.x.shape == (6, 3, 2)
    assert both.y[0].tolist() == [[3, -3], [4, -4]]
    x, y = next(iter(windows.batches(2, shuffle=False)))
    assert (x.tolist(), y.tolist()) == ([[0, 1, 2], [2, 3, 4]], [[3, 4], [5, 6]])


def test_time_split_shares_no_value_and_random_split_is_refused():
    series = torch.arange(100.0)
    train, val, test = Windows(series, 5, 2).split((0.6, 0.2, 0.2))
    values = [set(torch.cat([part.x.flatten(), part.y.flatten()]).tolist()) for part in (train, val, test)]
    assert values[0] == set(range(60))
    assert not values[0] & values[1]
    assert not values[1] & values[2]
    with pytest.raises(BadInput, match="leaks"):
        Windows(series, 5).split((0.5, 0.5), how="random")
    one, two = Windows(series, 5).split((0.5, 0.5), how="random", allow_leak=True)
    assert len(one) + len(two) == 95
    assert set(one.x.flatten().tolist()) & set(two.x.flatten().tolist())
    with pytest.raises(BadInput, match="add up to 1"):
        Windows(series, 5).split((0.5, 0.2))


def test_shuffling_the_future_changes_nothing_before_it():
    series = torch.randn(80, dtype=torch.float64)
    shuffled = torch.cat([series[:50], series[50:][torch.randperm(30)]])
    parts = [Windows(Scaler().fit(s[:50]).transform(s), 4).split((50 / 80, 30 / 80))[0] for s in (series, shuffled)]
    assert torch.equal(parts[0].x, parts[1].x)
    assert torch.equal(parts[0].y, parts[1].y)


def test_window_refusals():
    with pytest.raises(BadInput, match="hold no window"):
        Windows(torch.ones(4), 3, 2)
    with pytest.raises(BadInput, match="at least 1"):
        Windows(torch.ones(4), 0)
    with pytest.raises(BadInput, match="step 2"):
        Windows(torch.tensor([1.0, 2, math.inf, 4]), 1)
    with pytest.raises(BadInput, match=r"time, features"):
        Windows(torch.ones(2, 2, 2), 1)


def test_scaler():
    series = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([2.0, 5, 1]) + 7
    series[:, 2] = 4.0
    scaler = Scaler().fit(series)
    scaled = scaler.transform(series)
    torch.testing.assert_close(scaled[:, :2].std(0, correction=0), torch.ones(2, dtype=torch.float64))
    assert (scaled[:, 2] == 0).all()  # constant: centred, not blown up
    torch.testing.assert_close(scaler.inverse(scaled), series)
    with pytest.raises(BadInput):
        Scaler().fit(series[:1])


def test_metrics_by_hand():
    truth, forecast = torch.tensor([1.0, 2, 4]), torch.tensor([1.0, 4, 1])
    assert mae(truth, forecast) == pytest.approx(5 / 3)
    assert rmse(truth, forecast) == pytest.approx(math.sqrt(13 / 3))
    assert smape(truth, forecast) == pytest.approx((0 + 200 * 2 / 6 + 200 * 3 / 5) / 3)
    assert smape(torch.zeros(2), torch.zeros(2)) == 0
    train = torch.tensor([0.0, 2, 4, 6])
    assert mase(truth, forecast, train) == pytest.approx(5 / 3 / 2)
    assert mase(truth, forecast, train, season=2) == pytest.approx(5 / 3 / 4)
    walk = torch.randn(500, dtype=torch.float64).cumsum(0)
    assert mase(walk[1:], walk[:-1], walk) == pytest.approx(1)  # the naive forecast of the training series itself
    with pytest.raises(BadInput, match="no unit"):
        mase(truth, forecast, torch.ones(5))
    with pytest.raises(BadInput):
        mae(truth, forecast[:2])


def test_seasonal_naive():
    assert seasonal_naive(torch.arange(6.0), 5, 3).tolist() == [3, 4, 5, 3, 4]
    assert seasonal_naive(torch.arange(6.0).view(2, 3), 2).tolist() == [[2, 2], [5, 5]]
    with pytest.raises(BadInput):
        seasonal_naive(torch.ones(3), 1, 4)


def test_diebold_mariano():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    gap = a.square() - b.square()
    t = (gap.mean() / (gap.std() / math.sqrt(500))).item()  # for one step ahead: the paired t-test
    result = diebold_mariano(a, b)
    assert result.statistic == pytest.approx(t, rel=1e-9)
    assert diebold_mariano(b, a).statistic == pytest.approx(-result.statistic)
    assert diebold_mariano(a, 2 * b).p_value < 1e-6
    assert diebold_mariano(a, a).p_value == 1
    assert diebold_mariano(torch.zeros(9), torch.ones(9)).p_value == 0
    errors = torch.randn(2000, 400, 2, generator=generator, dtype=torch.float64)
    rejected = [diebold_mariano(e[:, 0], e[:, 1]).p_value < 0.05 for e in errors[:400]]
    assert 0.02 < sum(rejected) / len(rejected) < 0.08  # its level
    with pytest.raises(BadInput, match="too few"):
        diebold_mariano(a[:3], b[:3], horizon=3)


def test_an_unknown_split_is_refused():
    with pytest.raises(BadInput, match="'time' or 'random'"):
        Windows(torch.arange(30.0), 3).split((0.5, 0.5), how="shuffle", allow_leak=True)


def test_directional_accuracy():
    truth, forecast, last = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[5.0, 2.0], [4.0, 1.0]]), torch.tensor([[1.0], [1.0]])
    assert directional_accuracy(truth, forecast, last) == pytest.approx(1 / 3)  # one step does not move
    with pytest.raises(BadInput, match="never moves"):
        directional_accuracy(torch.ones(2), torch.ones(2), torch.ones(1))
    with pytest.raises(BadInput, match="broadcast"):
        directional_accuracy(truth, forecast, torch.ones(3))
