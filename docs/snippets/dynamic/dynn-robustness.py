"""Early exits save work on easy inputs. What can an attacker do to such a network that the plain one would never show?"""

from functools import partial

from torch import nn
from torch.optim import AdamW

from neurarium import data
from neurarium.dynamic import EarlyExit, dynn_robustness, fit_policy, with_exits

task = data.images("digits", train=600)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
)
policy = EarlyExit(with_exits(model, task.train.x[:2], cuts=2), threshold=0.5)
fit_policy(policy, task.train.batches(32), epochs=4, optimizer=partial(AdamW, lr=0.01))
static = EarlyExit(policy.staged, threshold=2.0)  # the same weights, never stops early
report = dynn_robustness(policy, static, (task.test.x[:50], task.test.y[:50]), eps=(0.1, 0.3), steps=3, early={"steps": 30})
print(report.static_to_dynamic, report.dynamic_to_static)  # shares of rows that fool both, for each eps
print(report.early_success, report.inflation)  # early answers made wrong in secret; cost under the slow-down over clean cost
