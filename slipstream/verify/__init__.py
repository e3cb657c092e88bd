"""Does a model compute what it should, layer by layer? Import the file you need, not the room."""
