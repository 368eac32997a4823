"""Halos make tiles dear. Can the maps of some tiles do with 4 or 2 bits, without any training?"""

import torch

from neurarium.dynamic import MobileConfig, mobile_net, patch_inference, quantmcu
from neurarium.dynamic.live import trace_memory
from neurarium.dynamic.mobile import Block

model = mobile_net(MobileConfig(8, (Block(1, 8), Block(3, 12, 2), Block(3, 24, 2)), 0, 10)).eval()  # your trained network
images = torch.rand(16, 3, 32, 32)  # a few of your images
patched = patch_inference(model, images, patches=(2, 2), split="1")
small = quantmcu(patched, images)
print(small.bits)  # of every tile and map
print(quantmcu(patched, images, lam=1.0).bitops / small.bitops)  # operations saved, counted
with torch.no_grad():
    print(trace_memory(small, images[:1]).peak, small.plan().peak)  # bytes of packed codes, traced and planned
