"""One training run: settings, steps, validation, and the files it writes."""
