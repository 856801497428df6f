"""Instruction tuning: conversations as tokens, with the tokens that the assistant says marked as answers.

A .jsonl file has a conversation per line, in either form:
  {"prompt": "What is 2 + 2?", "response": "4"}
  {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
Other fields are ignored. A system message may come first; then user and assistant take turns, either of them first. No message is added
that the file does not have.

A template makes text of them. What the assistant says and what is said to it are encoded apart, so that an answer begins and ends at a
token boundary, whatever the tokenizer would merge across it. An answer is what stands after the assistant's header up to and including the
one token that ends the turn; the rest is prompt. A conversation is never split over rows: each is read as if it were alone.

Shape letters: N conversations, K tokens of them all, T inputs of a row.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np

from infinicontext.data.copying import check_copy
from infinicontext.data.corpora import TEXTS_PER_CALL, Split, json_lines, local_files, split_of
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError

TemplateName = Literal["plain", "raw", "chatml", "llama3", "phi3"]
Messages = tuple[tuple[str, str], ...]  # (role, content) of each
ROLES = ("system", "user", "assistant")

# The source "examples": each question about each of these words and its opposite.
OPPOSITES = (
    "hot cold, big small, fast slow, up down, old new, wet dry, light dark, full empty, rich poor, hard soft, late early, loud quiet"
)
QUESTIONS = (
    "What is the opposite of {word}?",
    "Do you know the opposite of {word}?",
    "Please tell me the opposite of {word}.",
    "Which word is the opposite of {word}?",
    "I need the opposite of {word}.",
)


class Template(NamedTuple):
    """How a message is written."""

    header: str  # before its content
    content: str
    end: str  # the token that ends it; empty: the tokenizer's end of text, after answers only
    separator: str = ""  # between messages
    start: bool = False  # whether the tokenizer's start token comes before all
    strip: bool = False  # whether white space around a content is left out


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template("{Role}:", " {content}", "", separator="\n", start=True),
    "raw": Template("", "{content}", "", start=True),
    "chatml": Template("<|im_start|>{role}\n", "{content}", "<|im_end|>", separator="\n"),
    "llama3": Template("<|start_header_id|>{role}<|end_header_id|>\n\n", "{content}", "<|eot_id|>", start=True, strip=True),
    "phi3": Template("<|{role}|>", "{content}", "<|end|>"),
}


@dataclasses.dataclass(frozen=True)
class InstructionData:
    """Conversations, each whole in one row with others; go with objective.loss "answers", which leaves the prompts out of the loss.

    Attributes:
      source: a .jsonl file, a folder (all .jsonl files in it and below), a glob such as "chats/*.jsonl", or "examples", 60 short questions
        and answers that need no file.
      tokenizer: see `tokenizers.load_tokenizer`.
      template: "plain" ("User: ...\\nAssistant: ...", for any tokenizer), "raw" (prompts and answers as they are, one after the other), or
        the form in which a pretrained family was tuned, whose special tokens the tokenizer must have: "chatml" (Qwen), "llama3", "phi3"
        (Phi-3, Phi-4-mini).
      length: T. A conversation of more than T + 1 tokens is cut at its end, and left out if none of its answers remains; a line on stderr
        counts them.
      validation_fraction: share of conversations kept for validation, decided by the hash of their messages.
      one_document, copy_tokens: as in `pipeline.CorpusData`; both together are how TransformerFAM was trained.
    """

    source: str = "examples"
    tokenizer: str = "bytes"
    template: TemplateName = "plain"
    length: int = 512
    validation_fraction: float = 0.05
    one_document: bool = False
    copy_tokens: int = 0

    def __post_init__(self):
        check_copy(self)
        if self.template not in get_args(TemplateName):
            raise UserError(f'data.template is "{self.template}"; it must be one of {", ".join(get_args(TemplateName))}')
        if self.length < 1:
            raise UserError(f"data.length is {self.length}; it must be 1 or more")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; it must be above 0 and below 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """Conversations as tokens in one flat array.

    Attributes:
      tokens: [K], the smallest unsigned integer dtype that holds the vocabulary.
      answers: bool [K], which of them the assistant says.
      starts: int64 [N + 1]; conversation i is [starts[i] : starts[i + 1]] of both.
    """

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray


def load_conversations(data: InstructionData, tokenizer: Tokenizer, split: Split) -> Conversations:
    """Reads one split and encodes it, with a line on stderr if conversations are too long for a row.

    Raises:
      UserError: the source cannot be read or is malformed, the tokenizer lacks the template's tokens, or nothing is left for the split.
    """
    first, last = start_and_end(data, tokenizer)
    template = TEMPLATES[data.template]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    chosen = (messages for _, messages in conversations(data.source) if split_of(as_text(messages), data.validation_fraction) == split)
    tokens_N, answers_N, found, cut = [], [], 0, 0
    while batch := list(itertools.islice(chosen, TEXTS_PER_CALL)):
        pieces_N = [pieces(messages, template) for messages in batch]
        encoded = iter(tokenizer.encode_batch([piece for part in pieces_N for piece in part]))
        for part in pieces_N:
            ids, marks = [np.array(first, np.int32)], [np.zeros(len(first), bool)]
            for i in range(len(part)):
                ids.append(next(encoded))
                after_answer = i > 0 and i % 2 == 0
                if after_answer and not template.end:
                    ids[-1] = np.concatenate([[last], ids[-1]])
                marks.append(np.full(len(ids[-1]), i % 2 == 1))
                marks[-1][:1] |= after_answer
            one_T, marked_T = (np.concatenate(x)[: data.length + 1] for x in (ids, marks))
            found += 1
            cut += len(one_T) < sum(map(len, ids))
            if marked_T.any():
                tokens_N.append(one_T.astype(dtype))
                answers_N.append(marked_T)
    where = f'data.source "{data.source}": of the {found} conversations of its {split} split'
    if not found:
        raise UserError(
            f'data.source "{data.source}" has no conversation in its {split} split with data.validation_fraction '
            f"{data.validation_fraction}; give more conversations or another fraction"
        )
    if not tokens_N:
        raise UserError(f"{where}, none has an answer within data.length {data.length}")
    if cut:
        lost = f", and {found - len(tokens_N)} of those are left out, as none of their answers remained" if found > len(tokens_N) else ""
        print(f"warning: {where}, {cut} are longer than data.length {data.length} and were cut at their end{lost}", file=sys.stderr)
    starts = np.cumsum([0, *map(len, tokens_N)], dtype=np.int64)
    return Conversations(np.concatenate(tokens_N), np.concatenate(answers_N), starts)


def pieces(messages: Messages, template: Template) -> list[str]:
    """The text of a conversation, cut into what the assistant says (items 1, 3, ...) and what stands before, between and after (0, 2, ...).

    An end token begins the piece after its answer, because some of them change how a tokenizer reads the text that follows.
    """
    found = [""]
    for role, content in messages:
        if found != [""]:
            found[-1] += template.separator
        found[-1] += template.header.format(role=role, Role=role.capitalize())
        content = template.content.format(content=content.strip() if template.strip else content)
        if role == "assistant":
            found += [content, template.end]
        else:
            found[-1] += content + template.end
    return found


def start_and_end(data, tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """The ids before a conversation, and the id that ends an answer, by the template and the tokenizer that `data` names.

    Raises:
      UserError: the tokenizer has no such end.
    """
    template = TEMPLATES[data.template]
    end = tokenizer.encode(template.end).tolist() if template.end else [tokenizer.end_id]
    if len(end) != 1 or end == [None]:
        name = f"{template.end}, which ends a message" if template.end else "that ends a text"
        raise UserError(f'data.template is "{data.template}", but data.tokenizer "{data.tokenizer}" has no token {name}')
    return ((tokenizer.start_id,) if template.start and tokenizer.start_id is not None else ()), end[0]


def as_text(messages: Messages) -> str:
    """One text for one conversation, whichever form it had in its file."""
    return json.dumps(messages, ensure_ascii=False)


def conversations(source: str) -> Iterator[tuple[str, Messages]]:
    """The conversations of a source as (name, messages), in an order that is always the same.

    Raises:
      UserError: while iterating, if the source is missing, unreadable, malformed or empty.
    """
    if source == "examples":
        for number, (pair, question) in enumerate(itertools.product(OPPOSITES.split(", "), QUESTIONS)):
            word, other = pair.split()
            yield f"{source}:{number}", (("user", question.format(word=word)), ("assistant", f"The opposite of {word} is {other}."))
        return
    empty = True
    for path, name in local_files(source, (".jsonl",), '"examples", a .jsonl file, a folder or a glob'):
        for number, record in json_lines(path):
            empty = False
            yield f"{name}:{number}", _messages(record, f'data.source: "{path}", line {number}')
    if empty:
        raise UserError(f'data.source is "{source}", which holds no conversation; they are read from the lines of .jsonl files')


def _messages(record: object, where: str) -> Messages:
    """The messages of one record, checked."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object")
    if "messages" not in record:
        if missing := [name for name in ("prompt", "response") if name not in record]:
            raise UserError(f'{where} has no field {missing[0]}; it must have "prompt" and "response", or "messages"')
        return ("user", text_field(record, "prompt", where)), ("assistant", text_field(record, "response", where))
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages is not a list of objects")
    found: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        field, role = f"messages[{i}].", message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: {field}role is {json.dumps(role)}; it must be one of {', '.join(ROLES)}")
        if role == "system" and i > 0:
            raise UserError(f"{where}: {field}role is system; only the first message can be")
        if found and role == found[-1][0]:
            raise UserError(f"{where}: {field}role is {role} as in the message before; user and assistant must take turns")
        found.append((role, text_field(message, "content", where, field)))
    if all(role != "assistant" for role, _ in found):
        raise UserError(f"{where}: messages has no message with the role assistant, so there is nothing to learn")
    return tuple(found)


def text_field(record: dict, name: str, where: str, prefix: str = "") -> str:
    """A field that must be a text of at least one character that is not white space."""
    text = record.get(name)
    if not isinstance(text, str) or not text.strip():
        kind = "missing" if name not in record else "empty" if isinstance(text, str) else "not a text"
        raise UserError(f"{where}: {prefix}{name} is {kind}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {prefix}{name} has a lone surrogate, which is not Unicode") from error
    return text
