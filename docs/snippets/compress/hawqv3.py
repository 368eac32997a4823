"""Can my network run in integers only, and which layers can do with 4 bits?"""

import torch
from torch import nn

from neurarium.compress import count_float_ops, plan_bits, quantize_integer

model = nn.Sequential(  # your trained network
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
).eval()
images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
plan = plan_bits(model, [(images, labels)], choices=(4, 8), budget={"bops": 1e6})
network = quantize_integer(model, [images], bits=plan)
codes = network.encode(images)
print(plan.describe(), network(images).shape, count_float_ops(network.core, *codes))  # 0
