"""How do I train one network that adapts its weights to a known condition, here the angle by which an image is turned?"""

from math import pi

import torch
from torch import nn

from neurarium import data
from neurarium.learn import Backprop, HyperNetwork, design, evaluate

task = data.images("digits", train=400)
quarter = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
x = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(task.train.x, quarter)])
c = torch.stack([torch.cos(quarter * pi / 2), torch.sin(quarter * pi / 2)], 1)  # what the weights are made from
batches = [((c[i : i + 50], x[i : i + 50]), task.train.y[i : i + 50]) for i in range(0, 400, 50)]

target = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # any module
model = HyperNetwork(target, condition_dim=2, hidden=(16,))
Backprop().fit(model, batches, epochs=10)
print(evaluate(model, batches))
print(design(model).describe())
print({name: tuple(w.shape) for name, w in model.weights(torch.tensor([0.0, 1.0])).items()})
