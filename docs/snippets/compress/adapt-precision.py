"""How few bits does each layer need while it learns?"""

import torch
from torch import nn

from neurarium.compress import AdaPT

model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
batches = [(torch.randn(32, 20), torch.randint(3, (32,))) for _ in range(8)]
history = AdaPT(lookback=(5, 20)).fit(model, batches, epochs=4)  # the weights end in fixed point
print({name: rows[-1] for name, rows in history.extra.items() if name.startswith(("word", "frac"))})
