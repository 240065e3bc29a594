"""Builds examples/demo: a tiny chat model, its data and its hyperparameters. Start with build.py."""
