"""Can a network be rewritten so that pruning it hurts less, by something that learnt from other networks?"""

import torch
from torch import nn

from neurarium.compress import PruningMetaNet, meta_prune, meta_train


def network() -> nn.Module:  # your trained networks of one kind
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


loader = [(torch.randn(64, 10), torch.randint(3, (64,)))]
metanet = PruningMetaNet(hidden=16, layers=2)
meta_train(metanet, [network(), network()], loader, epochs=2)
small = meta_prune(network(), metanet, loader, ratio=0.5, finetune_epochs=(1, 1))  # half of the multiply-adds
print(small.plan.describe())
