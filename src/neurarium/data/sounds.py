"""Sound: spoken digits."""

from __future__ import annotations

import io
import re
import wave
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neurarium.data.files import open_zip, read_member
from neurarium.data.registry import fetch, find
from neurarium.data.tensors import TensorData
from neurarium.errors import BadInput

__all__ = ["AudioTask", "audio"]


@dataclass(frozen=True, eq=False)
class AudioTask:
    """x float32 (n, samples) in [-1, 1], zero-padded or cut at the end to one length; y int64 (n,); speaker number a recording."""

    name: str
    train: TensorData
    test: TensorData
    train_speaker: Tensor
    test_speaker: Tensor
    speakers: tuple[str, ...]
    classes: int
    rate: int  # samples a second
    note: str = ""


def audio(name: str = "spoken-digits", *, seconds: float = 1.0) -> AudioTask:
    """The Free Spoken Digit Dataset: ten digits, six speakers, 50 recordings each, 8 kHz.

    Its own split: recordings 0-4 of each speaker and digit test, the others train. 97 % of the recordings are shorter than 1 s.
    """
    source = find(name, "audio")
    (path,) = fetch(source)
    rate, length = 8000, round(8000 * seconds)
    if length < 1:
        raise BadInput(f"seconds must be positive, got {seconds}")
    rows: list[tuple[int, str, int, np.ndarray]] = []
    with open_zip(path) as archive:
        for member in sorted(archive.namelist()):
            match = re.fullmatch(r"(?:.*/)?(\d)_([a-z]+)_(\d+)\.wav", member)
            if match:
                rows.append((int(match[1]), match[2], int(match[3]), _samples(read_member(archive, member), member, rate)))
    if not rows:
        raise BadInput(f"{path.name}: holds no DIGIT_SPEAKER_INDEX.wav")
    speakers = tuple(sorted({r[1] for r in rows}))
    x = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        x[i, : len(row[3])] = row[3][:length]
    y, who = torch.tensor([r[0] for r in rows]), torch.tensor([speakers.index(r[1]) for r in rows])
    test = torch.tensor([r[2] < 5 for r in rows])
    data = torch.from_numpy(x)
    return AudioTask(
        name, TensorData(data[~test], y[~test]), TensorData(data[test], y[test]), who[~test], who[test], speakers, 10, rate, source.note
    )


def _samples(raw: bytes, member: str, rate: int) -> np.ndarray:
    try:
        with wave.open(io.BytesIO(raw)) as sound:
            if sound.getframerate() != rate or sound.getnchannels() != 1 or sound.getsampwidth() != 2:
                raise BadInput(f"{member}: needs {rate} Hz, one channel, 16 bits")
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise BadInput(f"{member}: not a readable WAV file ({error})") from error
    return np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768.0
