"""Attention: which kernel when, and quantized attention."""
