"""Records and small vocabularies that cross rooms. Import the file you need, not the room."""
