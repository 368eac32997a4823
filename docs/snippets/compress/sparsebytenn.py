"""Can a convolutional network skip half its weights in a way that this processor notices?"""

import torch
from torch import nn

from neurarium.compress import sparsebyte

model = nn.Sequential(
    nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)  # your network
loader = [(torch.rand(8, 3, 32, 32), torch.randint(64, (8,)))]
small = sparsebyte(model, loader, sparsity=0.5, group=(16, 1), epochs=1)  # rearranged, pruned, trained, swapped
print(small.plan.runtime.describe())
