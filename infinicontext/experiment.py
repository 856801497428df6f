"""One experiment: model, data, objective, optimizer, mesh, evaluation and budget; and its form in JSON files."""

import dataclasses
import types
import typing
from typing import Literal

from infinicontext.data.books import BookData
from infinicontext.data.images import ImageData
from infinicontext.data.instructions import InstructionData
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.data.recall import RecallData
from infinicontext.errors import UserError
from infinicontext.evaluation.suite import Evaluation
from infinicontext.models import MegalodonConfig, ModelConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.objectives.selective import Selective
from infinicontext.sharding import MeshConfig
from infinicontext.training.optimizer import OptimizerConfig

# nothing: rows begin empty. rows: row b goes on where row b ended. fam: all rows begin with the FAM that the first row ended with.
Carry = Literal["nothing", "rows", "fam"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    name: str
    model: ModelConfig
    data: CorpusData | PasskeyData | InstructionData | BookData | ImageData | RecallData
    objective: NextToken | Selective = NextToken()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: Evaluation = Evaluation()
    start_from: str = ""  # a run folder or a Hugging Face folder whose parameters training begins with; empty: random ones
    steps: int = 1000
    batch_size: int = 16  # rows per step over all devices
    accumulation: int = 1  # microbatches per step; the result is the same, the memory less
    carry: Carry = "nothing"  # what of a step's last states the next begins with, without gradients (training/carry.py)
    carry_probability: float = 0.8  # with which a step begins with a passed FAM
    seed: int = 0
    log_every: int = 10
    validation_every: int = 200
    validation_batches: int = 8
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    compilation_cache: str = "~/.cache/infinicontext/xla"  # compiled programs, kept between runs; empty switches it off

    def __post_init__(self):
        counts = (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "validation_every",
            "validation_batches",
            "checkpoint_every",
            "keep_checkpoints",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size is {self.batch_size}, which is not a multiple of accumulation, {self.accumulation}")
        if self.carry not in typing.get_args(Carry):
            raise UserError(f"carry is {self.carry}; it must be one of {', '.join(typing.get_args(Carry))}")
        if not 0 <= self.carry_probability <= 1:
            raise UserError(f"carry_probability is {self.carry_probability}; it must be from 0 to 1")
        if self.carry == "rows" and not (isinstance(self.data, CorpusData) and self.data.order == "sequential"):
            raise UserError(
                'carry is rows, for which data must be CorpusData with the order "sequential": rows that go on from step to step'
            )
        if self.carry == "rows" and self.accumulation > 1:
            raise UserError(f"carry is rows, for which accumulation must be 1, not {self.accumulation}")
        if self.carry == "rows" and getattr(getattr(self.model, "model", self.model), "random_offsets", False):
            raise UserError("carry is rows, for which model.random_offsets must be false: a row goes on at its own position")
        if self.carry == "fam" and not getattr(getattr(self.model, "model", self.model), "fam_length", 0):
            raise UserError(f"carry is fam, but the model, of kind {type(self.model).__name__}, has no FAM")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if self.objective.loss == "answers" and isinstance(self.data, CorpusData):
            raise UserError("objective.loss is answers, but data is CorpusData, which marks no answers; use all")
        if self.evaluation.norm_refresh and not (isinstance(self.model, MegalodonConfig) and isinstance(self.data, CorpusData)):
            raise UserError(
                f"evaluation.norm_refresh is {self.evaluation.norm_refresh}; it is for perplexity of a MegalodonConfig on CorpusData, "
                f"not of a {type(self.model).__name__} on {type(self.data).__name__}"
            )

    @property
    def train_length(self) -> int:
        """Tokens of a training row, at the end of a curriculum."""
        return max(self.data.lengths) if isinstance(self.data, PasskeyData) else self.data.length


def to_plain(config) -> dict:
    """A dataclass as dicts and lists; each dict names its class under "type", so that unions come back as they were."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {"type": type(value).__name__} | {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(config)


def from_plain(value: dict) -> Experiment:
    """The experiment that `to_plain` took apart.

    Raises:
      UserError: a class or a field this version does not have.
    """

    def options(hint) -> list[type]:
        return [kind for arg in typing.get_args(hint) for kind in options(arg)] if isinstance(hint, types.UnionType) else [hint]

    def build(hint, value, where: str):
        if isinstance(value, dict):
            kinds = {kind.__name__: kind for kind in options(hint) if dataclasses.is_dataclass(kind)}
            if value.get("type") not in kinds:
                raise UserError(f"config: {where} has type {value.get('type')}; this version knows {', '.join(kinds)}")
            kind = kinds[value["type"]]
            hints = typing.get_type_hints(kind)
            fields = {name: item for name, item in value.items() if name != "type"}
            if unknown := fields.keys() - hints.keys():
                raise UserError(f"config: {where} has the unknown field {min(unknown)}")
            return kind(**{name: build(hints[name], item, f"{where}.{name}") for name, item in fields.items()})
        if isinstance(value, list):
            item_hint = next((typing.get_args(kind)[0] for kind in options(hint) if typing.get_origin(kind) is tuple), None)
            return tuple(build(item_hint, item, where) for item in value)
        return value

    if not isinstance(value, dict):
        raise UserError(f"config: experiment is {value}; it must be an object")
    return build(Experiment, value, "experiment")


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Fields in which two experiments differ, as "optimizer.learning_rate: 0.001 -> 0.002"."""

    def compare(a, b, where: str) -> list[str]:
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            prefix = where + "." if where else ""
            return [
                line
                for field in dataclasses.fields(a)
                for line in compare(getattr(a, field.name), getattr(b, field.name), prefix + field.name)
            ]
        return [] if a == b else [f"{where}: {a} -> {b}"]

    return compare(old, new, "")
