"""Sparse T5-style language models in JAX: word experts and their baselines."""

__version__ = '0.1.0'
