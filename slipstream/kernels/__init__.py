"""How is one op computed fast? One op per file. Import the file you need, not the room."""
