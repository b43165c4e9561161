"""Weights that other programs have quantised, taken over with their own codes and scales."""
