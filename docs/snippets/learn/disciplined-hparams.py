"""Which learning rate, momentum and weight decay does my model want, without a grid search?"""

from torch import nn

from neurarium import data
from neurarium.learn import balance_search, evaluate
from neurarium.learn.balance import clues

task = data.images("digits", train=1200)
train, val = task.train.split(1000)
batches, watched = train.batches(64), val.batches(200, shuffle=False)


def make() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


recipe = balance_search(make, batches, watched, steps=30, momenta=(0.97, 0.9), decays=(1e-2, 1e-3, 0.0))
print(f"peak {recipe.max_lr:.2g}, momentum {recipe.momentum}, weight decay {recipe.weight_decay:g}, found in {recipe.steps} steps")
history = recipe.learner(6 * len(batches)).fit(model := make(), batches, epochs=6, val=watched)
print(clues([e["loss"] for e in history.train], [e["loss"] for e in history.val]).advice)
print(evaluate(model, task.test.batches(256, shuffle=False)))
