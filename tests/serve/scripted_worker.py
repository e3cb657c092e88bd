"""What stands for an API worker in tests of its supervisor? A process that speaks the protocol and is light.

It answers at the inherited socket with its process id; a file named `ill` beside the counts makes it die.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

from slipstream.serve.worker_orders import WORKER_READY, EnginesReady, News, WorkerOrder


def answer(listening: socket.socket) -> None:
    listening.setblocking(True)
    while True:
        peer, _ = listening.accept()
        with peer:
            peer.sendall(str(os.getpid()).encode())


def main() -> None:
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerOrder)
    folder = Path(order.counts_folder)
    # As one that is told to stop while it still starts, or drains for ever.
    if order.settings.drain_timeout_s == 0.25:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in iter(sys.stdin.buffer.readline, b""):
        if isinstance(msgspec.json.decode(line, type=News), EnginesReady):
            break
    listening = socket.socket(fileno=order.listening_fd)
    threading.Thread(target=answer, args=(listening,), daemon=True).start()
    sys.stdout.buffer.write(WORKER_READY)
    sys.stdout.buffer.flush()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(3)), daemon=True).start()
    while not (folder / "ill").exists():
        time.sleep(0.02)
    os._exit(7)


if __name__ == "__main__":
    main()
