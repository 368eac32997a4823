"""How many channels may each layer lose, if I need the same network at several sizes and want to search once?"""

import torch
from torch import nn

from neurarium.compress import ConditionalPruner

model = nn.Sequential(  # your trained network
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
)  # fmt: skip
held_out = [(torch.rand(64, 3, 12, 12), torch.randint(5, (64,)))]  # judges the pruned networks: not your test set
pruner = ConditionalPruner(model, example=torch.rand(1, 3, 12, 12), rates=(0.3, 0.5, 0.7), episodes=10).fit(held_out)
small = pruner.prune(0.5)  # half of the multiply-adds; fine-tune it as you like
print(small.plan.describe())
other = pruner.prune(0.4)  # a target that was never searched for
