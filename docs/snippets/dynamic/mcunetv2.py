"""A network's first maps do not fit the memory of a microcontroller. Can they be computed piece by piece, and what does it cost?"""

import torch

from neurarium.dynamic import mobile_net, patch_inference, plan_memory
from neurarium.dynamic.live import trace_memory

model, image = mobile_net().eval(), torch.randn(1, 3, 96, 96)  # your convolutional network
print(plan_memory(model, image).peak / 1024)  # kB of int8, layer by layer
patched = patch_inference(model, image, patches=(3, 3))  # the same function; the best split is searched
print(patched.plan().peak / 1024, patched.overhead)  # kB in tiles, and the share of FLOPs that is done twice
with torch.no_grad():
    print(trace_memory(patched, image).peak == patched.plan(bytes_per=4).peak)  # what float32 inference really allocates
