"""My regression net is small and Adam takes thousands of steps: can it be trained in a few dozen, without a learning rate?"""

import torch
from torch import nn

from neurarium import data
from neurarium.learn import OIGHWO, EarlyStopping, evaluate

task = data.tabular("diabetes", seed=0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
val = task.test.batches(1000, shuffle=False)
history = OIGHWO().fit(model, task.train.batches(1000), epochs=50, val=val, callbacks=[EarlyStopping(5)])
print(len(history.train), "iterations;", evaluate(model, val, loss="mse"))  # it fits small sets closely: stop by validation
