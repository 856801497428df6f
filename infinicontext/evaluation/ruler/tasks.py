"""The thirteen tasks of RULER: their parameters and, character for character, their texts.

The texts are the benchmark's fixed data (NVIDIA/RULER, Apache-2.0; NOTICE).
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."


class Needles(NamedTuple):
    """Values hidden under keys in a haystack; some keys are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Literal["words", "uuids"]
    values: Literal["numbers", "uuids"]
    key_count: int = 1
    value_count: int = 1  # of each key
    query_count: int = 1


class Variables(NamedTuple):
    """A chain of assignments in noise; all names with the first one's value are asked for."""

    hops: int = 4
    chains: int = 1


class CommonWords(NamedTuple):
    """A numbered list of words, ten of which come often."""

    asked: int = 10


class FrequentWords(NamedTuple):
    """Made-up words whose counts follow Zeta(alpha); the three most frequent are asked for."""

    alpha: float = 2.0
    letters: int = 6


class Questions(NamedTuple):
    """Questions about documents among others."""

    dataset: Literal["squad", "hotpotqa"]


Parameters = Needles | Variables | CommonWords | FrequentWords | Questions

TASKS: dict[str, Parameters] = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", key_count=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", value_count=4),
    "niah_multiquery": Needles("essay", "words", "numbers", key_count=4, query_count=4),
    "vt": Variables(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Questions("squad"),
    "qa_2": Questions("hotpotqa"),
}
CATEGORIES = {
    "retrieval": tuple(name for name in TASKS if name.startswith("niah")),
    "multi-hop": ("vt",),
    "aggregation": ("cwe", "fwe"),
    "questions": ("qa_1", "qa_2"),
}


class Text(NamedTuple):
    """What all samples of a kind of task say."""

    body: str
    prefix: str  # of the answer, behind the chat template
    tokens: int  # to generate


TEXTS: dict[type, Text] = {
    Needles: Text(
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "{type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided "
        "text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are",
        128,
    ),
    Variables: Text(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables "
        "that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, "
        "they are: ",
        30,
    ),
    CommonWords: Text(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
        "{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    FrequentWords: Text(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
        "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
    Questions: Text(
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are "
        "given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {query}",
        " Answer:",
        32,
    ),
}

# What a body stands in, by the benchmark's names; any other text with {task_template} will do.
CHATS = {
    "base": "{task_template}",
    "meta-chat": "[INST] {task_template} [/INST]",
    "vicuna-chat": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: {task_template} ASSISTANT:",
    "lwm-chat": "You are a helpful assistant. USER: {task_template} ASSISTANT: ",
    "Phi3": "<|user|>\n{task_template}<|end|>\n<|assistant|>\n",
    "meta-llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
}


def continuation(task: str, prompt: str, outputs: Sequence[str]) -> str:
    """The right answer as it goes on from a prompt, listed as in the task's own example; of answers that are each right, the first.

    Where the prompt does not say in which order, answers come in the order in which they first stand in it.
    """
    kind = TASKS[task]
    if isinstance(kind, CommonWords):
        listed = prompt[prompt.rfind(TEXTS[CommonWords].body[:20]) :]
        outputs = sorted(outputs, key=lambda word: re.search(rf"\. {re.escape(word)}\s", listed).start())
        said = " ".join(f"{number}. {word}" for number, word in enumerate(outputs, start=1))
    elif isinstance(kind, Variables):
        said = " ".join(outputs)
    elif isinstance(kind, Questions):
        said = outputs[0]
    else:
        if isinstance(kind, Needles) and kind.query_count == 1:
            outputs = sorted(outputs, key=prompt.index)
        said = ", ".join(outputs)
    return said if prompt.endswith(" ") else f" {said}"
