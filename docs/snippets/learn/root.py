"""Orthogonal momentum trains matrices well. Can it be kept exact for every shape of matrix, and calm when gradients have outliers?"""

import torch
from torch import nn

from neurarium.learn import ROOT

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
optimizer = ROOT(model.parameters(), lr=1e-2)  # drop-in: the rest of your loop stays as it is
for _ in range(5):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(32, 20)), torch.randint(3, (32,))).backward()
    optimizer.step()
