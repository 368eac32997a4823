"""How few bits can the weights have, if each layer's range is searched instead of spanned by its largest weight?"""

import torch
from torch import nn

from neurarium.compress import requant
from neurarium.meter import stored_bytes

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()  # your network
calibration = [torch.rand(64, 3, 8, 8)]
small = requant(model, bits=4, edges=8, activations=calibration)  # packed 4-bit codes, first and last layer 8, inputs 8
print(small.plan.describe(), stored_bytes(model), stored_bytes(small))
