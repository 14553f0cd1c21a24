"""Fused scans of pure chunk steps; knows nothing of Miras."""
