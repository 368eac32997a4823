"""One way to measure everything: parameters, bytes, FLOPs, memory kept for the backward pass, latency, energy.

    print(meter.profile(model, x))
    with meter.SavedBytes() as saved: step()
    meter.latency({"before": model, "after": pruned}, x)

No meter leaves a trace on the model that it measures.
"""

from neurarium.meter.clock import Timing, latency
from neurarium.meter.compute import flops, macs
from neurarium.meter.energy import CMOS_45NM, EnergyTable, energy
from neurarium.meter.memory import SavedBytes, saved_bytes
from neurarium.meter.profile import Profile, profile
from neurarium.meter.size import nonzero_parameters, parameters, stored_bytes
from neurarium.meter.state import undisturbed

__all__ = [
    "CMOS_45NM",
    "EnergyTable",
    "Profile",
    "SavedBytes",
    "Timing",
    "energy",
    "flops",
    "latency",
    "macs",
    "nonzero_parameters",
    "parameters",
    "profile",
    "saved_bytes",
    "stored_bytes",
    "undisturbed",
]
