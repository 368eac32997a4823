"""My linear layers are mostly zeros: how do I make the model smaller and, where it really is faster, run it sparse?"""

import torch
from torch import nn

from neurarium.compress import block_prune, to_sparse_runtime

model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))  # your model
masked = block_prune(model, block=(4, 1), sparsity=0.9)  # an ordinary masked copy: train it on
fast = to_sparse_runtime(masked, example=torch.randn(128, 256))  # each layer sparse or dense, whichever is faster here
print(fast.plan.describe())
