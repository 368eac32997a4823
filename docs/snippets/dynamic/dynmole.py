"""A frozen language model is tuned on mixed text. Can each token use as many low-rank experts as its router is unsure?"""

import torch
from torch.nn import functional as F

from neurarium.dynamic import DynMoLE, auxiliary_loss, mole_transform
from neurarium.dynamic.decoder import Decoder

decoder = Decoder(50, width=32, heads=2, layers=2, context=24)  # your pretrained model: it stays as it is
model = mole_transform(decoder, targets=("q", "v", "up", "down"), experts=4, rank=2, entropy_threshold=0.9)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(20):
    ids = torch.randint(50, (8, 24))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) + auxiliary_loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
layers = [m for m in model.eval().modules() if isinstance(m, DynMoLE)]
for m in layers:
    m.dispatch = "sparse"  # fewest FLOPs; "auto", the default, goes by the clock
model(ids)
print([m.last_active.float().mean().item() for m in layers], sum(m.last_cost.sum().item() for m in layers))  # experts a token; FLOPs
