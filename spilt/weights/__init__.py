"""Weight arithmetic (arXiv 2511.05408): dW = theta_pos - theta_neg of two adapters, a Steering at many linear maps.

adapters.py reads one adapter, training.py trains two; arithmetic.py and diagnostics.py work on any Steering whose entries are weights.
"""
