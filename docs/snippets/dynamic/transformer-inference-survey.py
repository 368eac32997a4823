"""Which way of cutting a transformer saves what, and what is left of it?"""

import torch

from neurarium import meter
from neurarium.dynamic import VisionTransformerS
from neurarium.experiments.dynamic.transformer_inference_survey import apply

model = VisionTransformerS(image=20).eval()  # your trained transformer
loader = [(torch.randn(32, 1, 20, 20), torch.randint(0, 10, (32,)))]
for technique, level in {"heads": 0.7, "ffn": 0.5, "layers": 0.5, "tokens": 0.5, "bits": 8}.items():
    small = apply(technique, model, level, loader)  # train it on, as you would train the model
    x = loader[0][0][:1]
    print(technique, meter.flops(small, x) / meter.flops(model, x), meter.stored_bytes(small) / meter.stored_bytes(model))
