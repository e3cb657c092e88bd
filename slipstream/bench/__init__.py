"""How fast is an engine, and did it really do the work? Import the file you need, not the room."""
