"""Who are my peers? The mesh of ranks and its collectives. Import the file you need, not the room."""
