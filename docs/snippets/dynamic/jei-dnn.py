"""An exit should be good on the inputs that leave there, a gate should let out those that gain by it. Can both be learned at once?"""

from torch import nn

from neurarium import data
from neurarium.dynamic import JEIDNN, fit_policy, with_exits

task = data.images("digits", train=300)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
)  # your trained network: it stays frozen
policy = JEIDNN(with_exits(model, task.train.x[:2], cuts=2), tradeoff=0.5, warmup_epochs=1)
fit_policy(policy, task.train.batches(64), epochs=2)
outcome = policy.eval().decide(task.test.x[:5])
print(outcome.choice, outcome.cost)  # the exit that each input took, and the FLOPs that it cost
