"""Can every layer learn from a guess of its own at the class, so that no error has to travel back through the network?"""

from torch import nn

from neurarium import data
from neurarium.learn import MonoForward, evaluate

task = data.images("digits", train=600)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
history = MonoForward(order="parallel").fit(model, task.train.batches(64), epochs=3)
print(evaluate(model, task.test.batches(256, shuffle=False)))  # model is an ordinary module: nothing is left behind
