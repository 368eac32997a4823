"""Can I train a network whose layers are an experiment on my table, without a model of the experiment?"""

from functools import partial

from torch.optim import Adam

from neurarium import data
from neurarium.learn import PhysicalChain, PhysicalForwardForward, PhysicalLayer, RandomScattering, evaluate

task = data.images("digits", train=600)
layers = [PhysicalLayer(RandomScattering(74, 74, seed=i), 74, 74) for i in (1, 2)]  # any object with in_dim, out_dim and a call
model = PhysicalChain(layers, features=64, classes=10)
PhysicalForwardForward(optimizer=partial(Adam, lr=2e-3)).fit(model, task.train.batches(600), epochs=10)
print(evaluate(model, task.test.batches(400, shuffle=False)))
