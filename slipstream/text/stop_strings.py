"""Where does a stop string end the text, and how much may be shown before that is known?

Aho-Corasick over all stops (Aho and Corasick, `Efficient string matching`, CACM 18(6), 1975): one automaton
step per character, amortised, whatever the stops look like. The state after a character is the longest suffix
of the text that begins some stop; exactly that suffix is held back. Output ends at the stop that is complete
first; of several that end together, the longest, so that nothing of a stop shows. The result does not depend
on how the text is cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Feed text, get back what may be released.

    `stops` are non-empty strings (their number and length are bounded where requests are checked). With
    `include_stop` the released text includes the stop. Once a stop matched, everything after it is dropped.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._automaton = Automaton(stops)
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Return (text that is final, the stop that ended it or None)."""
        if self.matched is not None:
            return "", self.matched
        automaton, state = self._automaton, self._state
        if not automaton.stops:
            return text, None
        for position, character in enumerate(text):
            state = automaton.step(state, character)
            stop = automaton.match[state]
            if stop is not None:
                return self._finish(self._held + text[: position + 1], stop), stop
        self._state = state
        text = self._held + text
        cut = len(text) - automaton.depth[state]
        self._held = text[cut:]
        return text[:cut], None

    def skip(self, text: str) -> str:
        """Return what is final of a text in which no stop ends; one that begins in it may end later."""
        automaton = self._automaton
        for character in text:
            self._state = automaton.step(self._state, character)
        text = self._held + text
        cut = len(text) - automaton.depth[self._state]
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return the text held back, now that no more will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _finish(self, text: str, stop: str) -> str:
        self.matched, self._held, self._state = stop, "", 0
        return text if self._include_stop else text[: len(text) - len(stop)]


class Automaton:
    """Goto and failure links of the stops; state 0 is the empty string.

    `depth[s]` is the length of the string that state s stands for, `match[s]` the longest stop that is a
    suffix of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(dict.fromkeys(stops))
        self.children: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]
        self.num_moves = 0
        for stop in self.stops:
            assert stop, "empty stop strings are refused by Request.create"
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """Return the next state. Amortised O(1): a failure move undoes an earlier forward move."""
        while True:
            self.num_moves += 1
            following = self.children[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fail[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self.children[state].get(character)
            if following is None:
                following = len(self.children)
                self.children[state][character] = following
                self.children.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = following
        self.match[state] = stop

    def _link(self) -> None:
        """Set failure links breadth first, so that a shorter state's link is known before it is used."""
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self.children[state].items():
                self.fail[child] = self.step(self.fail[state], character)
                if self.match[child] is None:
                    self.match[child] = self.match[self.fail[child]]
                queue.append(child)
