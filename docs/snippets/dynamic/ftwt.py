"""Not every input needs every filter. Can my trained convolutional network skip, for each image, the ones that would stay dark?"""

from torch import nn
from torch.optim import SGD

from neurarium import data
from neurarium.dynamic import FTWT, fit_policy

task = data.images("digits", train=300)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip
# your trained network: any that torch.fx can trace
policy = FTWT(model, mass=0.9, granularity=4, embedding=64, whole_below=1)  # without it maps as small as these are computed whole
batches = task.train.batches(64)
print(policy.predicted_flops(batches), "of", policy.full(task.train.x))  # FLOPs an image, known before any mask is learned
fit_policy(policy, batches, epochs=2, optimizer=lambda parameters: SGD(policy.groups(), momentum=0.9))
outcome = policy.eval().decide(task.test.x[:5])
print(policy.dynamic, outcome.choice, outcome.cost)  # filters that each image kept in each layer, and the FLOPs that it cost
