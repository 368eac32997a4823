"""Can a network that I need be written, instead of trained, by a model that has read many trained ones?"""

from torch import nn

from neurarium import data
from neurarium.learn import IGPG, GumbelVQ, Instruction, TaskConditioner, WeightGPT, WeightTokenizer, model_zoo
from neurarium.learn.zoo import accuracies

digits = data.images("digits")
architectures = {"mlp 64 8 10": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))}
zoo = model_zoo(architectures, {"digits": (digits.train, digits.test)}, nets=8, families=2, steps=150)  # 16 trained networks
reader = TaskConditioner({"digits": digits.train}, list(architectures))

codes = GumbelVQ(32, codes=64, code_dim=16, tokens_per_chunk=1)
model = IGPG(WeightTokenizer(32), codes, WeightGPT(64, condition_dim=reader.dim, layers=1, width=32, heads=2), reader)
model.fit_zoo(zoo, epochs_vq=60, epochs_prior=30)
written = model.generate(Instruction("digits", "mlp 64 8 10"), n=4)  # state_dicts, for load_state_dict
print("trained", sum(net.accuracy for net in zoo) / len(zoo))
print("written", accuracies(architectures["mlp 64 8 10"](), written, digits.test))
