"""Can a transformer lose heads and feed-forward units without any training afterwards?"""

import torch

from neurarium.compress import GPT, flap

model = GPT(65).eval()  # your trained model: GPT-2, OPT, Llama, ViT, torch's encoder, or a convolutional network
calibration = [torch.randint(0, 65, (16, 64)) for _ in range(4)]
small = flap(model, calibration, ratio=0.3)  # a smaller ordinary module
print(small.plan.describe())
