"""Every measurement of a patient costs money. Who needs the second one, and who the third?"""

import torch

from neurarium import data
from neurarium.dynamic import SGUQ

patients = data.multi_omics(300, dims=(40, 40, 40), seed=0)
train, val, new = patients.split(150, 60)
train, val, new = train.standardise(val, new)
torch.manual_seed(0)
policy = SGUQ(patients.dims, 2, members=3, hidden=(16, 16), prices=(300.0, 200.0, 150.0))
policy.fit(train.x, train.y, val=(val.x, val.y), epochs=(30, 50))
outcome = policy.eval().decide(new.x)  # stops where the ensemble agrees
print("views in order", policy.staged.order, "- stopped at", outcome.choice.bincount(), "- mean price", outcome.price.mean())
cheaper = policy.decide(new.x, price=250.0 + float(policy.spent()[0]) / 2)  # a budget for data
print(cheaper.price.mean(), (cheaper.output.argmax(1) == new.y).double().mean())
