"""Can a network learn when its error comes back through a fixed random matrix, and that matrix is a noisy piece of optics?"""

from functools import partial

from torch import nn

from neurarium import data
from neurarium.learn import DFA, OPU, evaluate

task = data.images("digits", train=600)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
rule = DFA(ternary=0.15, projector=partial(OPU, noise=0.1))
history = rule.fit(model, task.train.batches(32), epochs=6)
print(evaluate(model, task.test.batches(256, shuffle=False)))
print("exposures of the camera:", int(history.state["parts"]["feedback"]["frames"]))
