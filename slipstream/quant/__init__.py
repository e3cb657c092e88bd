"""How are a linear layer's weights stored and applied? Import the file you need, not the room."""
