"""Low rank, block sparse or block low rank: can a layer find its own structure while it learns?"""

import torch
from torch import nn

from neurarium.compress import gblr, pack_blocks

x = torch.randn(256, 16)
loader = [(x, (x[:, 0] > 0).long())] * 20  # your batches
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
learned = gblr(model, loader, budget=0.4, epochs=3)  # 40 % of the weights of all linear layers
small = pack_blocks(learned.eval())  # stores and multiplies the blocks only
print([layer.cost() for layer in small if hasattr(layer, "cost")])
