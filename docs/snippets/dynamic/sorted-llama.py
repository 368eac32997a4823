"""Can a language model be fine-tuned so that half of its layers are already a good model, and each token takes only the layers it needs?"""

from functools import partial

import torch
from torch.optim import AdamW

from neurarium.dynamic import Decoder, SortedFineTuning, fit_policy

ids = torch.tensor([list(b"to be, or not to be, that is the question: ")]).repeat(1, 9)
windows = ids.unfold(1, 33, 4)[0]  # (rows, 33) bytes
model = Decoder(128, width=32, layers=4, context=64)  # or a causal language model of transformers: Llama, GPT-2, OPT, ...
policy = SortedFineTuning(model, depths=(1, 2, 4))  # the model's own norm and head serve all three
fit_policy(policy, [(windows[:, :-1], windows[:, 1:])], epochs=5, optimizer=partial(AdamW, lr=3e-3))

half = policy.generate(windows[:2, :8], max_new_tokens=12, depth=2)
free = policy.generate(windows[:2, :8], max_new_tokens=12, threshold=0.1)
print(half.cost, free.cost, free.depth)  # FLOPs of each row; the layers that made each token
small = policy.extract(2)  # a stand-alone model of two layers
