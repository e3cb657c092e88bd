"""What are models built from? Sharding-aware, model-blind blocks. Import the file you need, not the room."""
