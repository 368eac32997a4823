"""AR-Net against statsmodels' AutoReg: are the coefficients the same, and what does a fit cost by order?

    OMP_NUM_THREADS=1 pytest benchmarks/sequence/test_ar_net.py -s

Prints one table from one run. AR-Net trains for five epochs of 20,000 points; the distances are between the estimators
(symmetric total percentage error), so that 0 means the same coefficients. Everything on one thread (the variable is for
numpy's). Skips without statsmodels.
"""

import time

import numpy as np
import pytest
import torch

from neurarium import data
from neurarium.sequence.forecast import ARNet, ClassicAR, stpe

ar_model = pytest.importorskip("statsmodels.tsa.ar_model")

ORDERS = (3, 25, 50, 100, 200, 400)
SPARSE = [0.2, 0, 0.3, 0, 0, 0, 0, 0, 0, -0.5]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(fit):
    began = time.perf_counter()
    return fit(), time.perf_counter() - began


@pytest.mark.usefixtures("one_thread")
def test_coefficients_and_time_by_order():
    series = data.arma(SPARSE, [], 20_000, seed=0)
    y = series.numpy()
    ARNet(3).fit(series, epochs=1)  # warms up
    rows, ratios = [], []
    for p in ORDERS:
        peer, peer_seconds = seconds(lambda p=p: ar_model.AutoReg(y, p, trend="c").fit().params)
        torch.manual_seed(0)
        net = ARNet(p)
        _, net_seconds = seconds(lambda net=net: net.fit(series, epochs=5))
        truth = torch.from_numpy(np.asarray(peer[1:]))
        ours = {}
        for method in ("ols", "normal", "yule-walker"):
            classic, spent = seconds(lambda method=method, p=p: ClassicAR(p, method).fit(series))
            ours[method] = spent
            if method != "yule-walker":
                np.testing.assert_allclose([classic.intercept, *classic.coefficients], peer, atol=1e-6)
        distance = stpe(net.coefficients, truth)
        ratios.append(peer_seconds / net_seconds)
        rows.append((p, peer_seconds, net_seconds, ratios[-1], *ours.values(), distance))
    print("\n     p   AutoReg   AR-Net  AutoReg/AR-Net   QR (ours)  shifted Gram  Yule-Walker   sTPE AR-Net to AutoReg")
    for p, *spent, distance in rows:
        peer_s, net_s, ratio, qr, normal, yule = spent
        print(f"{p:>6}{peer_s:>9.3f}s{net_s:>8.3f}s{ratio:>15.2f}x{qr:>11.3f}s{normal:>13.4f}s{yule:>12.4f}s{distance:>20.2f} %")
    assert ratios[-1] > ratios[0]  # least squares loses ground with the order
