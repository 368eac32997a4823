"""Can the attention of my transformer be taught to look at few regions, so that most of it can be cut away afterwards?"""

import torch
from torch import nn

from neurarium.nn import attention_calls, range_entropy_attention, replace_layers

encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
model = replace_layers(encoder, range_entropy_attention(size=8), example=torch.randn(1, 32, 16))  # the same function as before

tokens = torch.randn(4, 32, 16)
with attention_calls() as calls:
    loss = model(tokens).square().mean()  # your own loss
loss = loss + 0.1 * sum(call.penalty for call in calls)
loss.backward()

for layer in model.layers:
    layer.self_attn.keep = 0.2  # cut 80 % of every row
print(model(tokens).shape)
