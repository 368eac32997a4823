"""Quantised networks beside onnxruntime's static quantisation and torchao: accuracy at equal bits, in one run.

    pytest benchmarks/compress/test_quant.py -s
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from neurarium.compress import quantize_integer, requant
from neurarium.experiments.compress.zoo import accuracy, cifar, gpt, mobilenet, resnet
from neurarium.lab import Trial

CALIBRATION = 256


def onnx_accuracy(path: pathlib.Path, x: torch.Tensor, y: torch.Tensor) -> float:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = np.concatenate([session.run(None, {name: part.numpy()})[0] for part in x.contiguous().split(500)])
    return float((logits.argmax(1) == y.numpy()).mean())


@pytest.mark.parametrize("make", [resnet, mobilenet])
def test_integer_networks_beside_onnxruntime(make, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static

    torch.set_num_threads(1)
    trial = Trial(0, "laptop")
    task = cifar(trial)
    model = make(trial, task)
    images = task.train.x[:CALIBRATION].contiguous()
    plain, batch = tmp_path / "float.onnx", torch.export.Dim("batch")
    torch.onnx.export(model.to(memory_format=torch.contiguous_format), (images[:2],), str(plain), dynamo=True, verbose=False,
                      dynamic_shapes=({0: batch},))  # fmt: skip

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            import onnxruntime as ort

            name = ort.InferenceSession(str(plain), providers=["CPUExecutionProvider"]).get_inputs()[0].name
            self.parts = iter([{name: part.numpy()} for part in images.split(64)])

        def get_next(self):
            return next(self.parts, None)

    rows = {"float": accuracy(model, task), "float, onnxruntime": onnx_accuracy(plain, task.test.x, task.test.y)}
    for label, options in {
        "min-max": {}, "min-max, per channel": {"per_channel": True}, "entropy": {"calibrate_method": CalibrationMethod.Entropy},
        "percentile": {"calibrate_method": CalibrationMethod.Percentile},
    }.items():  # fmt: skip
        path = tmp_path / f"{label}.onnx"
        quantize_static(str(plain), str(path), Reader(), quant_format=QuantFormat.QDQ, **options)
        rows[f"onnxruntime 8 bits, {label}"] = onnx_accuracy(path, task.test.x, task.test.y)
    rows["ours 8 bits, integers only"] = ours = accuracy(quantize_integer(model, [images]), task)
    rows["ours 8 bits, searched ranges"] = accuracy(requant(model, bits=8, activations=[images]), task)
    for bits in (6, 4):
        rows[f"ours {bits} bits, searched ranges (no peer)"] = accuracy(requant(model, bits=bits, activations=[images]), task)
    print(f"\n{make.__name__}: " + "".join(f"\n  {name:45} {value:.4f}" for name, value in rows.items()))
    assert ours >= max(v for k, v in rows.items() if k.startswith("onnxruntime")) - 0.01


def test_weights_of_few_bits_beside_torchao() -> None:
    ao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    torch.set_num_threads(1)
    zoo = gpt(Trial(0, "laptop"))
    rows = {"float": zoo.loss()}
    linear = (nn.Linear,)
    for bits in (8, 4, 3, 2):
        import copy

        peer = copy.deepcopy(zoo.model)
        ao.quantize_(peer, ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity.PerAxis(0)))
        rows[f"torchao {bits} bits, per channel"] = zoo.loss(peer)
        rows[f"ours {bits} bits, searched range"] = zoo.loss(requant(zoo.model, bits=bits, transform=None, modules=linear))
        rows[f"ours {bits} bits, reshaped"] = zoo.loss(requant(zoo.model, bits=bits, modules=linear))
    print("\ncharacter model, cross-entropy of held-out text: " + "".join(f"\n  {name:35} {value:.4f}" for name, value in rows.items()))
    for bits in (4, 3):
        assert rows[f"ours {bits} bits, reshaped"] <= rows[f"torchao {bits} bits, per channel"] + 0.002
