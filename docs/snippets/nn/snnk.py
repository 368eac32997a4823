"""Can the hidden layers of a network be multiplied into one another, and the last one be solved instead of trained?"""

import torch
from torch import nn

from neurarium import data
from neurarium.nn import KernelLinear, bundle, fully_bundle, kernelise, replace_layers

task = data.images("digits")
x, y = task.train.x.flatten(1), task.train.y
mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
print(replace_layers(mlp, kernelise("relu", 32, init="fit"), example=x).replace_report)  # least squares against the old layers

chain = nn.Sequential(KernelLinear(64, 256, num_features=500), KernelLinear(256, 256, num_features=500), nn.Linear(256, 10))
small = bundle(chain)  # the same outputs; the 256 hidden units are gone
torch.testing.assert_close(small(x), chain(x), rtol=1e-3, atol=1e-3)

solved = fully_bundle(small, x, y)  # closed form, no gradient step
print((solved(task.test.x.flatten(1)).argmax(1) == task.test.y).float().mean())
