"""Can a network be trained so that replacing its layers by thin ones at the end costs nothing?"""

import torch
from torch import nn

from neurarium.compress import trp

loader = [(torch.randn(32, 20), torch.randint(3, (32,)))]  # your batches
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
thin = trp(model, loader, epochs=20, period=5, energy=0.9)  # trained, then decomposed
print(thin.plan.describe())
