"""From token ids to text one token at a time: whole characters only, and an eye on stop strings."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so a tail that is still undecodable after three more tokens never will be.
LONGEST_WAIT = 3


class TextStream:
    """Text of a growing row of tokens.

    decode: ids to text, with U+FFFD for bytes that are not UTF-8. prompt: ids before the first token (their text is not
    emitted; SentencePiece needs them to know whether a word begins). stop: strings that end the text.

    `push` returns the text that became certain: never half a character, and never a beginning of what may become a stop
    string; `finish` the rest. All pieces together are the text of all ids up to the first stop string, which is left
    out together with what follows it. Bytes that never become UTF-8 are left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self._decode = decode
        self._known = [int(i) for i in prompt[-4:]]  # tokens whose text is out
        self._new: list[int] = []
        self._held = ""
        self._stop = tuple(text for text in stop if text)
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now."""
        if self.stopped:
            return ""
        self._new.append(int(token))
        text = self._fresh(self._new)
        if not text.endswith(REPLACEMENT):
            self._known, self._new = (self._known + self._new)[-4:], []
            return self._emit(text)
        if len(self._new) <= LONGEST_WAIT:
            return ""  # perhaps half a character
        first, self._new = self._new[:1], self._new[1:]
        return self._emit(self._fresh(first))

    def finish(self) -> str:
        """The text that was held back, at the end of the row."""
        text, self._new = self._fresh(self._new), []
        out = self._emit(text)
        held, self._held = self._held, ""
        return out if self.stopped else out + held

    def _fresh(self, tokens: list[int]) -> str:
        """What `tokens` add to the text of the known ones."""
        return self._decode(self._known + tokens)[len(self._decode(self._known)) :]

    def _emit(self, text: str) -> str:
        self._held += text.replace(REPLACEMENT, "")
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
