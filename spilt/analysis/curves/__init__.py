"""Log-odds against multiplier: fits of the paper's curve models (fit.py) and what is read from them (readings.py)."""

from spilt.analysis.curves.fitting import CurveFit, Warned, evaluate, fit_curve, r_squared, validity_decay
from spilt.analysis.curves.readings import BUDGET, equal_preference, flattened, recommendation, regions, utility_drops, utility_peak

__all__ = [
    "BUDGET",
    "CurveFit",
    "Warned",
    "equal_preference",
    "evaluate",
    "fit_curve",
    "flattened",
    "r_squared",
    "recommendation",
    "regions",
    "utility_drops",
    "utility_peak",
    "validity_decay",
]
