"""Log-odds against multiplier: fits of the paper's curve models (fitting.py) and what is read from them (readings.py)."""

from spilt.analysis.curves.fitting import CurveFit, Warned, checked, evaluate, fit_curve, r_squared, validity_decay
from spilt.analysis.curves.readings import flattened, regions, utility_drops, utility_peak
