"""Text from a stream of tokens: whole characters only, and nothing past a stop text."""

from collections.abc import Iterator, Sequence

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.inference.generate import Completion

_CONTEXT = 8  # prompt tokens that are decoded with the new ones: what a token looks like can depend on those before it


class TextStream:
    """One row's text as its tokens come.

    Attributes:
      text: all that is settled so far.
      count: tokens taken.
      finish: "stop" once a stop text or a stop token was reached, before which `text` ends; "length" until then.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.text, self.count, self.finish = "", 0, "length"
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = [int(token) for token in prompt[-_CONTEXT:]]
        self._before = len(tokenizer.decode(self._ids))

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Takes new tokens -> the text that they settle; `last` gives out what was held back."""
        if self.finish == "stop":
            return ""
        self._ids += [int(token) for token in tokens]
        self.count += len(tokens)
        text = self._tokenizer.decode(self._ids)[self._before :]
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.finish, settled = "stop", min(ends)
        else:
            settled = len(text) if last else _settled(text, self._stop)
        new = text[len(self.text) : settled]
        self.text += new
        return new


def _settled(text: str, stop: Sequence[str]) -> int:
    """Characters of a text that what follows cannot change: not the start of a stop text, nor an unfinished character."""
    end = len(text.rstrip("\ufffd"))
    for sequence in stop:
        held = next((n for n in range(min(len(sequence) - 1, end), 0, -1) if text[:end].endswith(sequence[:n])), 0)
        end = min(end, len(text[:end]) - held)
    return end


def follow(rows: list[TextStream], bursts: Iterator[list[Completion]]) -> Iterator[list[str]]:
    """What each burst of `generate.stream` adds to each row's text; ends when every row has stopped, with all text settled."""
    for burst in bursts:
        yield [row.add(part.tokens, last=part.finish == "stop") for row, part in zip(rows, burst)]
        for row, part in zip(rows, burst):
            row.finish = part.finish if row.finish == "length" else row.finish
        if all(row.finish == "stop" for row in rows):
            return
    yield [row.add([], last=True) for row in rows]
