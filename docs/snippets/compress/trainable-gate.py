"""How can a network choose its own channels while it trains, down to half of the multiply-adds?"""

import torch
from torch import nn

from neurarium.compress import GateLoss, add_gates, strip_gates

model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
x, y = torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))

gated = add_gates(model, example=x[:2])  # then train it as you always do, with one more term in the loss
loss = GateLoss(gated, target=0.5, weight=2.0)
optimizer = torch.optim.SGD(gated.parameters(), lr=0.05, momentum=0.9)
for _ in range(20):
    optimizer.zero_grad()
    loss(gated(x), y).backward()
    optimizer.step()
small = strip_gates(gated)  # plain layers
print(small.plan.describe())
