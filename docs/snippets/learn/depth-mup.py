"""Can I tune the learning rate on a network of 2 residual blocks and use it on one of 32?"""

import torch
from torch import nn

from neurarium.learn import MeanSubtraction, MuAdam, depth_mup_, infer_shapes


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


blocks = [Residual(nn.Linear(64, 64), nn.ReLU(), MeanSubtraction()) for _ in range(32)]
model = nn.Sequential(nn.Linear(20, 64), *blocks, nn.Linear(64, 3))
shapes = depth_mup_(model, infer_shapes(model), [str(i) for i in range(1, 33)], base_depth=2)
optimizer = MuAdam(model, shapes, lr=1e-2)  # best at depth 2; the branches' weights now learn at a quarter of it
for _ in range(5):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(32, 20)), torch.randint(3, (32,))).backward()
    optimizer.step()
