"""Which model families are there, and how do their weights get in? Import the file you need, not the room."""
