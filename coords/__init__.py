"""The map: where tokens are and what pulls them, as one HTML page."""
