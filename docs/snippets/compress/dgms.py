"""How do I store my network's weights as 4-bit codes of 16 values that the task itself has chosen?"""

import torch
from torch import nn

from neurarium.compress import dgms
from neurarium.meter import stored_bytes

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))  # your trained network
batches = [(torch.randn(64, 20), torch.randint(3, (64,))) for _ in range(4)]
small = dgms(model, batches, components=16, epochs=2, lr=1e-3)  # the first and the last layer stay as they are
print(small[2], stored_bytes(model), "->", stored_bytes(small))
