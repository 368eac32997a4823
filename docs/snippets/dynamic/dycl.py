"""A network stops early, loops until it is done, or picks an expert. Compilers refuse it, or freeze one path. How do I deploy it?"""

import torch
from torch import nn

from neurarium.dynamic import split


class Impatient(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.exit = nn.Linear(16, 32), nn.Linear(32, 4)
        self.rest = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x):
        h = torch.relu(self.first(x))
        y = self.exit(h)
        if y.softmax(-1).max() > 0.4:
            return y
        return self.rest(h)


class PerRow(Impatient):
    def forward(self, x):  # the same, with one answer a row
        h = torch.relu(self.first(x))
        y = self.exit(h)
        if y.softmax(-1).amax(-1) > 0.4:
            return y
        return self.rest(h)


x = torch.randn(64, 16)
program = split(PerRow().eval(), x)
print(program.plan.listing())  # segments that only compute, and what is asked between them
outcome = program.compile("export").decide(x)  # or "onnx", "inductor"; program.save(folder) needs no torch to run
print(outcome.choice.bincount(), outcome.cost.sum())  # rows part where they decide differently: each costs what it needs
single = split(Impatient().eval(), x[:1], rows="batch")  # one decision a call, as the module was written
