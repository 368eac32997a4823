"""Can a second network that carries the classes down teach every layer, without any error going back?"""

from torch import nn

from neurarium import data
from neurarium.learn import CounterCurrent, evaluate

task = data.images("digits", train=600)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, 128), nn.ELU(), nn.Linear(128, 10))
rule = CounterCurrent()
rule.fit(model, task.train.batches(32), epochs=3)
print(evaluate(model, task.test.batches(256, shuffle=False)))  # the forward network predicts alone
print(rule.trained(model).feedback)  # the teacher, if you want it
