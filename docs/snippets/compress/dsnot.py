"""My pruned network lost too much, and I cannot train it: can better weights be kept instead?"""

import torch
from torch import nn

from neurarium.compress import dsnot, wanda

dense = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))  # your trained network
calibration = [torch.randn(200, 20)]
sparse = wanda(dense, calibration, sparsity=0.7)
better = dsnot(sparse, dense, calibration, modules=["2"])  # where inputs have a mean: behind the ReLU
