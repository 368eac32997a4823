"""Can one training give many networks, from which each device takes the largest that it can afford?"""

from functools import partial

from torch import nn
from torch.optim import AdamW

from neurarium import data
from neurarium.dynamic import SortedNet, fit_policy

task = data.images("digits", train=300)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))  # yours
policy = SortedNet(model, task.train.x[:2])  # eight widths; an elastic copy of the model is made
fit_policy(policy, task.train.batches(32), epochs=8, optimizer=partial(AdamW, lr=3e-3))
policy.eval()
for budget in (2_000, 5_000, 12_000):  # FLOPs a row
    outcome = policy.decide(task.test.x, budget=budget)
    print(budget, int(outcome.cost[0]), float((outcome.output.argmax(1) == task.test.y).float().mean()))
small = policy.extract(2)  # a plain module with weights of its own
