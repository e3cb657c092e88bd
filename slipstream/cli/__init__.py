"""What does a person type? One file per sub-command; `main.py` joins them."""
