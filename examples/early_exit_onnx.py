"""A network with early exits is trained, split at its decisions, saved, and run where neither torch nor neurarium can be imported.

The folder holds one .onnx file a segment, the plan (what is asked between them, with every calibrated budget) and ``host.py``, which needs
onnxruntime and numpy alone. Copy the folder to where it shall run.

    python examples/early_exit_onnx.py [folder]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import AdamW

from neurarium import data
from neurarium.dynamic import EarlyExit, fit_policy, split, with_exits

#: What runs in the other process: it cannot import torch or neurarium, even where they are installed.
ELSEWHERE = """
import json, sys
sys.modules["torch"] = sys.modules["neurarium"] = None  # importing them fails
sys.path.insert(0, ".")
import numpy as np
from host import load
x, program = np.load("images.npy"), load()
said = {}
for name, budget in json.loads(sys.argv[1]).items():
    outcome = program.decide(x, budget=budget)
    said[name] = {"answer": outcome["output"][0].argmax(1).tolist(), "exit": outcome["choice"].tolist(), "cost": int(outcome["cost"].sum())}
said["loaded"] = sorted({m.split(".")[0] for m, v in sys.modules.items() if v is not None} & {"torch", "neurarium", "numpy", "onnxruntime"})
print(json.dumps(said))
"""


def main(folder: str | None = None, epochs: int = 6) -> None:
    torch.manual_seed(0)
    task = data.images("digits", train=1200, seed=0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    train, val = task.train.split(1000, seed=0)
    policy = EarlyExit(with_exits(model, train.x[:2], cuts=2))
    fit_policy(policy, train.batches(64, seed=0), epochs=epochs, optimizer=partial(AdamW, lr=3e-3), seed=0)
    policy.eval().calibrate(val.batches(100, shuffle=False))

    x, y = task.test.x, task.test.y
    cheapest, *_, full = policy.costs(x).total
    budgets = {"everything": full, "less": cheapest + 0.4 * (full - cheapest), "little": cheapest + 0.1 * (full - cheapest)}
    with tempfile.TemporaryDirectory() as temporary:
        target = split(policy, x[:2]).save(folder or temporary)
        np.save(target / "images.npy", x.numpy())
        ran = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, json.dumps(budgets)], cwd=target, check=True, capture_output=True, text=True, timeout=120
        )
    said = json.loads(ran.stdout)

    console = Console(width=100)
    table = Table("budget", "accuracy", "FLOPs a row", "leave at exit 0, 1, 2", "as in torch", box=box.SIMPLE)
    for name, budget in budgets.items():
        there = said[name]
        with torch.no_grad():
            here = policy.decide(x, budget=budget)
        accuracy = np.mean(np.array(there["answer"]) == y.numpy())
        same = here.choice.tolist() == there["exit"] and int(here.cost.sum()) == there["cost"]
        share = np.bincount(there["exit"], minlength=3) / len(x)
        table.add_row(
            name, f"{accuracy:.3f}", f"{there['cost'] / len(x):,.0f}", " ".join(f"{s:.2f}" for s in share), "yes" if same else "no"
        )
    console.print(table)
    console.print(f"loaded in that process: {', '.join(said['loaded'])}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
