"""Can a layer learn its own kind of multiplication, and so do the same work with a fraction of the parameters?"""

import torch
from torch import nn

from neurarium.nn import hypercomplex, replace_layers

model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.LazyLinear(10))
model(torch.randn(1, 3, 16, 16))
lighter = replace_layers(model, hypercomplex(4), example=torch.randn(2, 3, 16, 16))
print(lighter.replace_report)  # which layers changed, which were kept, and why
