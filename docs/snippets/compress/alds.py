"""A network must lose half of its weights: how much of each layer, and cut in how many slices, so that no layer suffers much?"""

import torch
from torch import nn

from neurarium.compress import alds

model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))  # trained
small = alds(model, keep=0.5)  # ordinary layers again, to be trained on or saved
print(small.plan.describe())
print(small(torch.randn(1, 3, 8, 8)).shape)
