"""Can I tune the learning rate on a network of 32 units and use it on one of 512?"""

import torch
from torch import nn

from neurarium.learn import MuAdam, infer_shapes, mup_


def network(width):
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


model = network(512)
shapes = infer_shapes(model, base=network(32))  # what grows, and by how much; nothing is written on the tensors
mup_(model, shapes)
optimizer = MuAdam(model, shapes, lr=1e-2)  # the rate that was best at width 32; each group gets its own
for _ in range(5):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(32, 20)), torch.randint(3, (32,))).backward()
    optimizer.step()
