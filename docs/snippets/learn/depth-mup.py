"""Can I tune the learning rate on a network of 2 residual blocks and use it on one of 32?"""

import torch
from torch import nn

from neurarium.learn import MeanSubtraction, MuAdam, depth_mup_, infer_shapes


class Network(nn.Module):
    def __init__(self, depth, width=64):
        super().__init__()
        self.stem, self.head = nn.Linear(20, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU(), MeanSubtraction()) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


model = Network(depth=32)
shapes = depth_mup_(model, infer_shapes(model), [f"branches.{i}" for i in range(32)], base_depth=2)
optimizer = MuAdam(model, shapes, lr=1e-2)  # best at depth 2; the branches' weights now learn at a quarter of it
for _ in range(5):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(32, 20)), torch.randint(3, (32,))).backward()
    optimizer.step()
