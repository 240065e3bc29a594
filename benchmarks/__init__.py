"""Measurements of cost. Nothing in the package imports this folder. See RESULTS.md."""
