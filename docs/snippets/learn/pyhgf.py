"""How fast does this series change, how sure can I be, and is it changing faster than it used to?"""

import torch

from neurarium.learn import HGF, HGFLearner, surprise

torch.manual_seed(0)
walks = (0.3 * torch.randn(4, 100, dtype=torch.float64)).cumsum(1)  # four series at once
net = HGF(levels=2, update="unbounded")  # a level, and the volatility of its steps
HGFLearner(["tonic_volatility"]).fit(net, [(walks, torch.ones(4))], epochs=5)
run = net.run(walks)
print("level", run.mean["level1"][0, -1].item(), "volatility", run.mean["level2"][0, -1].item())
print("surprise an observation", surprise(run).mean().item())

with net.edit():  # a third level, in the middle of things
    net.add_continuous("level3").volatility("level3", "level2")
print(net.run(walks[:, -10:], start=run.last).mean["level3"][0, -1].item())
