"""Which weights may go, and how must the others move, if all of them are chosen together instead of one by one?"""

import torch
from torch import nn

from neurarium.compress import chita, finalise

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))  # your trained network
calibration = [(torch.randn(200, 20), torch.randint(3, (200,)))]
pruned = chita(model, calibration, sparsity=0.8)  # a masked copy, which can be trained on
small = finalise(pruned)  # plain weights again
