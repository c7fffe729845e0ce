"""Precision as data: the schemes, which layers are fused, and what each engine can load. No torch."""
