"""Which channels can go at least harm to the loss, and which deserve a cheap implant instead?"""

import torch
from torch import nn

from neurarium.compress import hap

model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
x, y = torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,))

small = hap(model, [(x, y)], ratio=0.5, of="params", implant=0.2, probes=8)
print(small.plan.describe())
