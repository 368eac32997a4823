"""Can a fixed wavelet transform do the mixing of pixels, and leave only cheap 1x1 convolutions to learn?"""

import torch
from torch import nn

from neurarium import meter
from neurarium.nn import WaveMixLite, dwt2, idwt2, replace_layers, wave_mixing

x = torch.randn(2, 1, 28, 28)
coarse, details = dwt2(x, "db2", levels=2, mode="periodization")
torch.testing.assert_close(idwt2(coarse, details, "db2", mode="periodization"), x, atol=1e-5, rtol=1e-5)  # nothing is lost

net = WaveMixLite(1, 10, depth=10, channels=8, dropout=0.0, upsample="bilinear")
print(meter.parameters(net), net(x).shape)  # 3,566 parameters

cnn = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
cnn(x)
print(replace_layers(cnn, wave_mixing(levels=2), example=x).replace_report.describe())
