"""How accurate is a network whose training saw each label only through clipping and noise, and what does that promise to a label?"""

from functools import partial

from torch import nn
from torch.optim import SGD

from neurarium import data
from neurarium.learn import PrivateDFA, epsilon, evaluate

task = data.images("digits", train=1200)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
rule = PrivateDFA(optimizer=partial(SGD, lr=0.3, momentum=0.9), sigma=0.5)
history = rule.fit(model, task.train.batches(64), epochs=5)
print(evaluate(model, task.test.batches(256, shuffle=False)))
print(epsilon(rule, n=1200, batch=64, steps=history.steps, delta=1e-5))  # with the assumptions under which it holds
