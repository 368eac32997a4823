"""Does my hypernetwork's output scale with its input, and what removes that?"""

import torch
from torch import nn

from neurarium.learn import HyperNetwork, magnitude_probe, mip

target = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 1, 3, padding=1))
noise_level = torch.linspace(0.05, 1, 20)[:, None]  # the condition: one number in [0, 1]

print("plain", magnitude_probe(HyperNetwork(target, condition_dim=1), noise_level))  # weights proportional to the condition
print("mip  ", magnitude_probe(mip(target, condition_dim=1), noise_level))
denoised = mip(target, condition_dim=1)(torch.tensor([0.3]), torch.rand(4, 1, 14, 14))  # one call: weights for 0.3, then the network
print(denoised.shape)
