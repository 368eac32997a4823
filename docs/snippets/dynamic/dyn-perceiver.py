"""Exits on early feature maps spoil the maps for the last exit. Can a small branch carry the exits instead?"""

from torch import nn

from neurarium import data
from neurarium.dynamic import DistilledExit, DynPerceiver, fit_policy

task = data.images("digits", train=300)


def stage(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


stages = [stage(8, 8, 1), stage(8, 16, 2), stage(16, 16, 1)]  # the stages of your network
network = DynPerceiver(stages, (8, 8, 16, 16), num_classes=10, stem=stage(1, 8, 1), latents=8, pool=4)
policy = DistilledExit(network)  # EarlyExit trains it with plain cross-entropies
fit_policy(policy, task.train.batches(50), epochs=2)
policy.eval().calibrate(task.train.batches(100))
table = policy.costs(task.test.x)
outcome = policy.decide(task.test.x[:20], budget=(table.total[0] + table.full) / 2)
print(outcome.choice, outcome.cost)  # 0, 1: the tokens answered; 2, 3: the last map was needed
