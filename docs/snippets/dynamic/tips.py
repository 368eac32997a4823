"""A super-network has thousands of sub-networks. Which of them should training concentrate on?"""

from functools import partial

from torch.optim import AdamW

from neurarium import data
from neurarium.dynamic import TIPS, ElasticBackbone, ElasticFamily, fit_policy
from neurarium.dynamic.elastic import grid

task = data.images("digits", train=300)
x = task.train.x[:2]
model = ElasticBackbone(widths=(8, 12), strides=(1, 2), blocks=(0, 1))
policy = TIPS(ElasticFamily(model, grid(model, (0.5, 1.0)), x), x, levels=3, per_level=2)  # 16 sub-networks, at most 8 are kept
fit_policy(policy, task.train.batches(50), epochs=3, optimizer=partial(AdamW, lr=5e-3))
scores = policy.eval().calibrate(task.train.batches(100, shuffle=False))  # validation data in earnest
for i in policy.front(x):  # what budgets choose from
    print(policy.configs[i], int(policy.prices(x)[i]), float(scores[i]))
