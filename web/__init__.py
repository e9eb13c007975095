"""What the map and the chat page share."""
