"""Mixtures of experts in 4 bits."""
