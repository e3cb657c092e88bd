"""What does `python -m slipstream` do? The same as the `slipstream` command."""

from __future__ import annotations

from slipstream.cli.main import main

if __name__ == "__main__":
    main()
