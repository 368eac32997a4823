"""Do the layers of my network gain from a space with room for hierarchies, and how long do they take there?"""

import torch
from torch import nn

from neurarium.nn import PoincareBall, hyperbolic, replace_layers

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))
curved = replace_layers(model, hyperbolic(PoincareBall(c=0.1, learnable=True)), example=torch.randn(2, 3, 16, 16))
print(curved.replace_report)

images = torch.randn(2, 3, 16, 16)
flat = replace_layers(model, hyperbolic(PoincareBall(c=1e-6), init="fit"), example=images)  # almost flat: the same function
print((flat(images) - model(images)).abs().max())
