"""How do I train a network whose weights are one bit, without inventing a gradient for the sign?"""

import torch
from torch import nn

from neurarium.compress import BiPerConv2d, biper_penalty, pack_binary, set_stage

x, y = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
model = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), BiPerConv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(512, 3)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for stage in (1, 2):  # first the sine, then its sign
    set_stage(model, stage)
    for _ in range(5):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + biper_penalty(model, tau=0.04)).backward()
        optimizer.step()
small = pack_binary(model.eval())  # one bit a weight
