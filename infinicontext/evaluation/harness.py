"""Our models for lm-evaluation-harness (lm_eval 0.4.13 or newer): any of its tasks, and RULER's samples as tasks of our own.

    infinicontext lm-eval run --model infinicontext --model_args model=runs/infini --tasks arc_easy
    simple_evaluate(model=HarnessModel("runs/infini"), tasks=["arc_easy"])

lm_eval finds models by name only after they were registered, which importing this file does; `infinicontext lm-eval` does that and hands
everything after it on to lm_eval's own command line.
"""

import collections
import functools
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from infinicontext import sharding
from infinicontext.data.instructions import TEMPLATES, TemplateName, pieces
from infinicontext.errors import UserError
from infinicontext.inference.generate import Generation, stream
from infinicontext.inference.score import score
from infinicontext.inference.text import TextStream, follow
from infinicontext.training.run_folder import KEPT
from infinicontext.training.weights import load_model

log = logging.getLogger(__name__)


@register_model("infinicontext")
class HarnessModel(TemplateLM):
    """A run or a pretrained folder as lm_eval's model."""

    def __init__(
        self,
        model: str,
        batch_size: int | str = 4,
        max_length: int = 65536,
        max_gen_toks: int = 256,
        rolling: Literal["stream", "windows"] = "stream",
        segment: int = 512,
        add_bos_token: bool | None = None,
        chat: TemplateName | None = None,
        dtype: str | None = None,
        step: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """What --model_args may say.

        Args:
          model: a run folder or a Hugging Face folder.
          batch_size: requests read together.
          max_length: tokens; of longer requests the beginning is left out, with a warning.
          max_gen_toks: new tokens, where a task does not say.
          rolling: how the likelihood of whole texts is had. stream: read once with the state carried along; windows: as lm_eval's own
            adapters, in windows of max_length that forget one another.
          segment: tokens per call while prompts are read.
          add_bos_token: whether the start token comes before a text; None: as the model was trained.
          chat: the template of --apply_chat_template; None: the folder's own.
          dtype: of parameters and computation; None: as trained.
          step: of a run's checkpoint; None: the newest.
          device, max_batch_size: what lm_eval hands to every model; the machine's devices are used.

        Raises:
          UserError: no such folder, no tokenizer, or options that are not allowed.
        """
        super().__init__()
        if rolling not in ("stream", "windows"):
            raise UserError(f"rolling is {rolling}; it must be stream or windows")
        if chat is not None and chat not in TEMPLATES:
            raise UserError(f"chat is {chat}; it must be one of {', '.join(TEMPLATES)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size}; it must be a number of 1 or more")
        self.folder = pathlib.Path(model)
        self.mesh = sharding.make_mesh(sharding.MeshConfig(data=1, tensor=jax.device_count()))
        with jax.set_mesh(self.mesh):
            self.loaded = load_model(self.folder, self.mesh, dtype=dtype, step=step)
        if self.loaded.tokenizer is None:
            raise UserError(f"{model} has no tokenizer.json, so it cannot read text")
        self.batch_size, self.max_length, self.max_gen_toks = int(batch_size), max_length, max_gen_toks
        self.rolling, self.segment, self.add_bos_token, self.chat = rolling, segment, add_bos_token, chat

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.loaded.stop[0] if self.loaded.stop else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose first token is scored.

        Raises:
          UserError: the tokenizer has no such token.
        """
        ids = (self.loaded.tokenizer.start_id, *self.loaded.stop)
        if found := [token for token in ids if token is not None]:
            return found[0]
        raise UserError(f"{self.folder}: its tokenizer has no token that starts or ends a text, before which a first token could be scored")

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return self.loaded.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; a start token that a chat template has written is not written twice."""
        ids = self.loaded.tokenizer.encode(string).tolist()
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
        if add_special_tokens is False:
            return ids
        if add_special_tokens and self.loaded.tokenizer.start_id is not None:
            start = [self.loaded.tokenizer.start_id]
        elif self.loaded.start is None:
            whole = self.loaded.tokenizer.library.encode(string).ids
            start = whole[: len(whole) - len(ids)]
        else:
            start = list(self.loaded.start)
        return ids if ids[: len(start)] == start else [*start, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log probabilities of the continuation, whether it is what the model would say) of each request, in their order."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        cut = 0
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for batch in _in_batches(order, self.batch_size, "loglikelihood", disable_tqdm):
            prompts, rows = [], []
            for i in batch:
                _, context, continuation = requests[i]
                kept = [*context, *continuation][-self.max_length - 1 :]
                cut += len(kept) < len(context) + len(continuation)
                rows.append(continuation[-len(kept) + 1 :])
                prompts.append(kept[: len(kept) - len(rows[-1])])
            for i, row, scored in zip(batch, rows, self._score(prompts, rows)):
                found[i] = float(scored.log_probability_A.sum(dtype=np.float64)), bool((scored.likeliest_A == row).all())
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        if cut:
            log.warning("%d requests have more than max_length %d tokens; their beginnings were left out", cut, self.max_length)
        return found

    def _score(self, prompts: list[list[int]], rows: list[list[int]]):
        # A batch that is not full is filled up, so that fewer programs are compiled.
        missing = self.batch_size - len(rows)
        with jax.set_mesh(self.mesh):
            return score(self.loaded.model, prompts + prompts[:1] * missing, rows + rows[:1] * missing, segment=self.segment)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, its first token after the prefix token."""
        texts = [request.args[0] for request in requests]
        found = [0.0] * len(texts)
        for batch in _in_batches(range(len(texts)), self.batch_size, f"loglikelihood_rolling, {self.rolling}", disable_tqdm):
            prompts, rows, owners = [], [], []
            for i in batch:
                ids = self.tok_encode(texts[i], add_special_tokens=False)
                for prompt, row in self._windows(ids) if ids else []:
                    prompts.append(prompt)
                    rows.append(row)
                    owners.append(i)
            for at in range(0, len(rows), self.batch_size):
                part = slice(at, at + self.batch_size)
                for i, scored in zip(owners[part], self._score(prompts[part], rows[part])):
                    found[i] += float(scored.log_probability_A.sum(dtype=np.float64))
            for i in batch:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, found[i])
        return found

    def _windows(self, ids: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """What is read before, and what is scored."""
        if self.rolling == "stream":
            return [([self.prefix_token_id], ids)]
        windows = get_rolling_token_windows(ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
        return [(context, continuation) for context, continuation in map(make_disjoint_window, windows)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """New text of each request, up to the first of its stop texts."""
        found, drawn = [""] * len(requests), 0
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        for same in groups.values():
            until, options = self._generation(dict(requests[same[0]].args[1]))
            room, cut = self.max_length - options.max_new_tokens, 0
            if room < 1:
                raise UserError(f"max_length is {self.max_length}; with answers of {options.max_new_tokens} tokens it must be more")
            contexts = {i: self.tok_encode(requests[i].args[0]) for i in same}
            for batch in _in_batches(sorted(same, key=lambda i: -len(contexts[i])), self.batch_size, "generate_until", disable_tqdm):
                cut += sum(len(contexts[i]) > room for i in batch)
                filled = batch + batch[:1] * (self.batch_size - len(batch))
                prompts = [contexts[i][-room:] for i in filled]
                rows = [TextStream(self.loaded.tokenizer, prompt, until) for prompt in prompts]
                with jax.set_mesh(self.mesh):
                    # Rows are numbered over all requests, so that those which repeat a prompt draw other tokens.
                    bursts = stream(self.loaded.model, prompts, options, first_row=drawn)
                    collections.deque(follow(rows, bursts), maxlen=0)
                drawn += len(batch)
                for i, row in zip(batch, rows):
                    found[i] = row.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, row.text)
            if cut:
                log.warning("%d prompts have more than %d tokens; their beginnings, and needles there, were left out", cut, room)
        return found

    def _generation(self, wanted: dict) -> tuple[list[str], Generation]:
        """Stop texts and options of a task's generation_kwargs."""
        until = wanted.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        temperature = float(wanted.pop("temperature", 0.0) or 0.0)
        if not wanted.pop("do_sample", temperature > 0):
            temperature = 0.0
        tokens = wanted.pop("max_gen_toks", None) or wanted.pop("max_new_tokens", None) or self.max_gen_toks
        options = Generation(
            max_new_tokens=int(tokens),
            temperature=temperature,
            top_k=wanted.pop("top_k", None),
            top_p=float(wanted.pop("top_p", 1.0)),
            stop=tuple((token,) for token in self.loaded.stop),
            segment=self.segment,
        )
        if wanted:
            log.warning("generation options that are not known here are left out: %s", ", ".join(wanted))
        return [text for text in until if text], options

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt, its last message stays open."""
        if self.chat is None:
            how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return self._kept.apply_chat_template(chat_history, tokenize=False, **how)
        template = TEMPLATES[self.chat]
        messages = [(message["role"], message["content"]) for message in chat_history]
        if add_generation_prompt:
            # Without the empty message and what ends it.
            return "".join(pieces((*messages, ("assistant", "")), template)[:-2])
        written = pieces(messages, template)
        # An open message of the assistant's lacks what ends it, which is a piece of its own.
        return "".join(written[:-1] if messages[-1][0] == "assistant" else written)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What goes into the record of an evaluation."""
        if not chat_template:
            return None
        return self._kept.chat_template if self.chat is None else str(TEMPLATES[self.chat])

    def get_model_info(self) -> dict:
        """What goes into it beside lm_eval's own: how the likelihood of whole texts was had is not the same everywhere."""
        return {"model_folder": str(self.folder), "rolling": self.rolling, "max_length": self.max_length}

    @functools.cached_property
    def _kept(self):
        """The Hugging Face tokenizer, for its chat template."""
        from transformers import AutoTokenizer

        for folder in (self.folder, self.folder / KEPT):
            if (folder / "tokenizer_config.json").is_file() and (found := AutoTokenizer.from_pretrained(folder)).chat_template:
                return found
        raise UserError(f"{self.folder} has no chat template; name one of {', '.join(TEMPLATES)} by --model_args chat=NAME")


def _in_batches(items: Sequence[int], size: int, name: str, quiet: bool) -> Iterable[list[int]]:
    items = list(items)
    return tqdm([items[at : at + size] for at in range(0, len(items), size)], desc=name, disable=quiet)
