"""Moral vignettes: short scenes that a model calls wrong or not, unsteered and steered (after wassname/weight-steering, a rebuild of
arXiv 2511.05408).

files.py reads them, evaluate.py asks the model, summary.py and tables.py tell what changed, figure.py draws it.
"""

from __future__ import annotations
