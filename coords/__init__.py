"""The map: where tokens are, what pulls them, drawn as one HTML page."""
