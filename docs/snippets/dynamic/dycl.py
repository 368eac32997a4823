"""A network stops early, loops until it is done, or picks an expert. Compilers refuse it, or freeze one path. How do I deploy it?"""

import torch
from torch import nn

from neurarium.dynamic import split


class Impatient(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.exit, self.rest = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x):
        h = torch.relu(self.first(x))
        y = self.exit(h)
        return y if y.softmax(-1).amax(-1) > 0.4 else self.rest(h)


program = split(Impatient().eval(), x := torch.randn(64, 16))
print(program.plan.listing())  # segments that only compute, and what is asked between them
print(program.compile("export").decide(x).cost)  # or "onnx", "inductor"; program.save(folder) needs no torch to run
