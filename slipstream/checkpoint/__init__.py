"""Readers of model files, one per format. `open_checkpoint` is the only door."""
