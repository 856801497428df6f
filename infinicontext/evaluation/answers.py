"""Questions, and answers to them in a file from which an evaluation that was killed goes on.

Shape letters: P tokens of a prompt.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Question(NamedTuple):
    """One prompt and what answers it."""

    size: int  # of the context: tokens, pairs, documents
    place: float | str  # where the answer stands, or the data set it is from
    index: int  # among those of the same size and place
    prompt_P: np.ndarray  # int32, the start token included
    answers: tuple[str, ...]  # any of which is right
    continuation: str  # the prompt's right continuation, as text
    new_tokens: int  # at which an answer is cut off
    classes: tuple[str, ...] = ()  # what answers are, where the score counts others that are named
    asked: str = ""  # the question itself, where the score looks at it


class Answer(NamedTuple):
    """What a model made of a question."""

    text: str
    right: float | None = None  # the share of the right answer's tokens that were given, where those are compared


class Answers:
    """Answers so far. The file is only ever added to, and may hold those to other questions or of other models, too."""

    def __init__(self, path: Path | None, about: dict):
        """`about` is what is asked of what; answers to something else are not used."""
        self.path, self.found = path, {}
        if path is None:
            return
        about = json.loads(json.dumps(about))
        self.of_what = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        before = path.read_text("utf-8") if path.exists() else ""
        known = False
        for line in before.splitlines():
            try:
                of_what, key, answer = json.loads(line)
                if of_what != self.of_what:
                    continue
                if key == "about":
                    known = True
                else:
                    self.found[tuple(key)] = Answer(*answer)
            except (ValueError, TypeError):
                # Cut off where a process was killed.
                continue
        # A line that was cut off must not swallow the next.
        self._write(("\n" if before and not before.endswith("\n") else "") + ("" if known else self._line("about", about)))

    def of(self, question: Question) -> Answer | None:
        """The answer, if there is one."""
        return self.found.get(_key(question))

    def keep(self, question: Question, answer: Answer) -> None:
        """Adds one."""
        self.found[_key(question)] = answer
        if self.path is not None:
            self._write(self._line(_key(question), answer))

    def _line(self, key, value) -> str:
        return json.dumps([self.of_what, key, value]) + "\n"

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _key(question: Question) -> tuple:
    """By its prompt, too: another text in the same file of a corpus makes another question."""
    return question.size, question.place, question.index, zlib.crc32(question.prompt_P.tobytes())
