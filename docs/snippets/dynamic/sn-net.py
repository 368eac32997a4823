"""I have two trained networks and need the sizes between them. Can I get those without training one network for each?"""

from torch import nn

from neurarium import data
from neurarium.dynamic import fit_policy, stitch

task = data.images("digits", train=300)


def network(width: int) -> nn.Sequential:  # your trained networks: vision transformers, stages of convolutions, any chain of modules
    blocks = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(16 * width, 10))


policy = stitch([network(4), network(12)], task.train.x[:2])
policy.init_stitches(task.train.x[:100])  # the maps between them, by least squares
fit_policy(policy, task.train.batches(64), epochs=2)
policy.eval().calibrate(task.train.batches(64))
print(*zip(policy.prices(task.test.x).tolist(), policy.configs), sep="\n")  # FLOPs an image, and which blocks of which network
policy.use(task.test.x, budget=20_000)  # the most accurate one within the budget; nothing is copied
alone = policy.extract(example=task.test.x, budget=20_000)  # or that one as a plain module
