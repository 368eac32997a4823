"""Can the blocks of a network learn without hearing of each other, each by taking noise off the label?"""

from torch import nn

from neurarium import data
from neurarium.learn import NoProp, NoPropNet, evaluate

task = data.images("digits", train=600)


def encoder() -> nn.Module:  # yours: any network from inputs to features, made anew for each block
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())


model = NoPropNet(encoder, task.classes, task.train.x[:2], steps=4, hidden=64)
NoProp().fit(model, task.train.batches(32), epochs=4)
print(evaluate(model, task.test.batches(256, shuffle=False)))  # from noise through all blocks to a label
