"""I can afford half of my sensors. Which ones does my forecaster need, and can it learn to live with them at the same time?"""

from torch import nn

from neurarium import data
from neurarium.dynamic import DynST, apply_mask

task = data.advected_field(40, 10, size=12)
model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))  # any forecaster
history = DynST(sparsity=0.5, rounds=3).fit(model, task.train.batches(20), epochs=4)
print(history.mask.int())  # 1 where a sensor stays; the model is trained for this layout
deployed = apply_mask(model, history.mask)
print(deployed(task.test.x).shape)  # all cells are predicted, whatever the other sensors send
