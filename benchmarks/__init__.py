"""Measures speed and memory of NGT beside the baseline."""
