"""Two trained networks of different depth know the same task: can they become one before it is trained on?"""

import torch
from torch import nn

from neurarium.compress import cla_fuse

deep = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
shallow = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))  # both trained, by you
samples = [(torch.randn(200, 20), torch.zeros(200))]  # labels are not used
fused = cla_fuse(deep, shallow, samples)  # as deep as the first, as wide as the second; fine-tune it now
small = cla_fuse(deep, shallow, samples, balance="merge")  # the size of the second
print(fused.plan.describe())
