"""Logits to tokens. Import the file you need, not the room."""
