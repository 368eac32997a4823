"""Can the layers of a graph network learn one by one, with nothing but a prototype of each class to compare with?"""

import torch
from torch.nn import functional as F

from neurarium.learn import GraphForward, GraphLayers
from neurarium.learn.graph_forward import UNKNOWN

torch.manual_seed(0)
y = torch.arange(90) % 3  # a graph of three communities
link = (torch.rand(90, 90) < torch.where(y[:, None] == y, 0.15, 0.01)).triu(1)
edge_index = torch.nonzero(link | link.T).T
x = torch.randn(90, 8) + F.one_hot(y, 8)
known = torch.rand(90) < 0.3

layers = GraphLayers("gcn", 8, 16, 16)  # or your own layers: anything called (x, edge_index)
rule = GraphForward()
rule.fit(layers, [((x, edge_index), torch.where(known, y, UNKNOWN))], epochs=60)
scores = rule.predictor(layers)(x, edge_index)
print((scores.argmax(1) == y)[~known].float().mean())
