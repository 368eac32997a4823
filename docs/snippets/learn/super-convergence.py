"""How large may my learning rate be, and how do I train to the end in few steps with it?"""

from functools import partial

from torch import nn
from torch.optim import SGD

from neurarium import data
from neurarium.learn import Backprop, OneCycle, evaluate, lr_range_test

task = data.images("digits", train=1200)
batches = task.train.batches(64)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
sgd = partial(SGD, lr=0.1, momentum=0.9)

found = lr_range_test(model, "cross_entropy", batches, sgd)  # on a copy: the model is untouched
print(f"lowest loss at {found.lowest:.2g}, diverges at {found.divergence:.2g}, try {found.suggestion:.2g}")
cycle = partial(OneCycle, max_lr=found.suggestion, total_steps=5 * len(batches))
state = Backprop(optimizer=sgd, schedule=cycle).fit(model, batches, epochs=3).state
longer = partial(cycle, total_steps=8 * len(batches))  # resume to another length: what remains of the cycle is stretched
Backprop(optimizer=sgd, schedule=longer).fit(model, batches, epochs=8, resume=state)
print(evaluate(model, task.test.batches(256, shuffle=False)))
