"""Does a full collection leave alone what was there when a process became ready? In a process of its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from slipstream.core.collector import freeze_collector

class Node:
    def __init__(self):
        self.me = self

early = [[] for _ in range(100_000)]
freeze_collector()
assert gc.get_freeze_count() > 100_000, gc.get_freeze_count()
tracked = len(gc.get_objects())
assert tracked < 10_000, tracked
for _ in range(100):
    Node()
assert gc.collect() >= 100
"""


def test_what_was_there_is_not_looked_at_again_and_new_garbage_is_freed() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


HELD = """
import gc
from slipstream.core.collector import FROZEN

class Node:
    def __init__(self):
        self.me = self

gc.disable()
before = gc.get_freeze_count()
Node()
FROZEN.hold()
node = Node()
FROZEN.hold()
del node
assert gc.get_freeze_count() > before + 1000
FROZEN.release()
assert gc.get_freeze_count() > before + 1000 and gc.collect() == 0
FROZEN.release()
assert gc.get_freeze_count() == 0 and gc.collect() >= 1
"""


def test_the_last_holder_gives_back_what_was_frozen() -> None:
    subprocess.run([sys.executable, "-c", HELD], check=True, timeout=60)
