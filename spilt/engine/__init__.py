"""Fit, score and decode: the plain way for every model and every steering (whole.py); the fast way is tested equal to it."""
