"""Where in the image does a network see its evidence, if the answer is averaged over small disturbances of that image?"""

import torch
from torch import nn

from neurarium.trust.explain import class_activation

model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
report = class_activation(model, torch.rand(2, 3, 32, 32), samples=10)
print(report.map.shape)  # (images, height, width), each map in [0, 1]
