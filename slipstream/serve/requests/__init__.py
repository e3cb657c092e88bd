"""What may a request body say? One file per endpoint family."""
