"""What both models are built from: their common settings, and the parts of a layer."""
