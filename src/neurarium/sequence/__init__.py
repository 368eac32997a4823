"""Models of time: causal maps from a sequence to a sequence, and forecasters.

What every forecaster here shares: windows that are cut by time and never across the border between training and test, scalers that see the
training range alone (:mod:`.windows`), and errors in the units that forecasters use (:mod:`.accuracy`).
"""

from neurarium.sequence.accuracy import DieboldMariano, diebold_mariano, directional_accuracy, mae, mase, rmse, seasonal_naive, smape
from neurarium.sequence.forecast import ARNet, ClassicAR, stpe
from neurarium.sequence.windows import Scaler, Windows

__all__ = [
    "ARNet",
    "ClassicAR",
    "DieboldMariano",
    "Scaler",
    "Windows",
    "diebold_mariano",
    "directional_accuracy",
    "mae",
    "mase",
    "rmse",
    "seasonal_naive",
    "smape",
    "stpe",
]
