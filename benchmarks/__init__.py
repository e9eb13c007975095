"""Speed and memory, measured beside the baseline."""
