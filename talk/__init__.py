"""Chat with a checkpoint, in a terminal or on a local web page."""
