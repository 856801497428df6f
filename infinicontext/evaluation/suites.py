"""Sets of evaluations by name: a quick look, the usual ones, and the settings of one paper."""

import dataclasses

import numpy as np

from infinicontext.data.images import ImageData
from infinicontext.data.pipeline import CorpusData
from infinicontext.data.recall import RecallData
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.tasks import TASKS
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment

SUITES = ("smoke", "standard", "paper:infini", "paper:longrope", "paper:beacon", "paper:lost_in_the_middle", "paper:ruler")
STANDARD = (4096, 8192, 16384, 32768)
TENTHS = tuple(int(depth) / 100 for depth in np.linspace(0, 100, 10))


def suite(name: str, experiment: Experiment) -> list[Evaluation]:
    """What a name stands for, one after another; fields that a suite does not set are those of the experiment.

    smoke: minutes on a CPU, at one to four times the training length; of recall for models that are trained on it. standard: RULER,
    passkeys, needles, key-value retrieval, BABILong and perplexities from 4K to 32K. paper:NAME: what that paper asked; documents of
    LongRoPE's are cut to the length, so that it is one window. Perplexities are left out where the data are no corpus.

    Raises:
      UserError: there is no such suite, or it has nothing for these data.
    """
    if name not in SUITES:
        raise UserError(f"--suite is {name}; it must be one of {', '.join(SUITES)}")
    own, data = experiment.evaluation, experiment.data
    perplexities = ("perplexity", "document_perplexity") if isinstance(data, CorpusData) else ()
    if isinstance(data, RecallData):
        if name != "smoke":
            raise UserError(f"--suite is {name}; RecallData, whose ids are no text, has smoke alone")
        return [dataclasses.replace(own, tasks=("recall",), lengths=(data.length, 2 * data.length, 4 * data.length))]
    if isinstance(data, ImageData):
        raise UserError(f"--suite is {name}, but data are images; they are evaluated by accuracy alone")
    forced, decoded = (dataclasses.replace(own.asking, mode=mode) for mode in ("teacher_forced", "generate"))
    if name == "smoke":
        length = experiment.train_length
        quick = dataclasses.replace(own.ruler, tasks=("niah_single_1", "vt", "fwe"), samples=min(own.ruler.samples, 5), example_budget=2000)
        passkey = dataclasses.replace(own.passkey, mode="teacher_forced")
        return [
            dataclasses.replace(own, tasks=("passkey", *perplexities), lengths=(length, 2 * length, 4 * length), passkey=passkey),
            dataclasses.replace(own, tasks=("magic_number", "ruler"), lengths=(512, 1024), asking=forced, ruler=quick),
        ]
    if name == "standard":
        tasks = ("ruler", "passkey_beacon", "key_value", "babilong", *perplexities)
        facts = ("qa1", "qa2", "qa3", "qa4", "qa5") if own.babilong.facts else ("qa1", "qa2", "qa3")
        kinds = {
            "key_value": dataclasses.replace(own.key_value, pairs=(75, 140)),
            "babilong": dataclasses.replace(own.babilong, tasks=facts),
            "ruler": dataclasses.replace(own.ruler, tasks=tuple(TASKS), mode="generate"),
        }
        return [
            dataclasses.replace(own, tasks=tasks, lengths=STANDARD, asking=decoded, **kinds),
            dataclasses.replace(own, tasks=("magic_number",), lengths=STANDARD, asking=forced),
        ]
    if name == "paper:infini":
        lengths = (32768, 131072, 262144, 524288, 1048576)
        return [
            dataclasses.replace(own, tasks=("passkey",), lengths=lengths, passkey=dataclasses.replace(own.passkey, depths=(0.0, 0.5, 1.0)))
        ]
    if name == "paper:longrope":
        sliding = dataclasses.replace(own.document_perplexity, protocol="sliding", window=0, stride=256, windows=10)
        lengths = tuple(4096 * 2**i for i in range(10))
        tasks = ("passkey_landmark", *(("document_perplexity",) if perplexities else ()))
        return [dataclasses.replace(own, tasks=tasks, lengths=lengths, document_perplexity=sliding, asking=decoded, seed=42)]
    if name == "paper:beacon":
        lengths = lambda count: tuple(int(length) for length in np.linspace(8192, 131072, count))
        passkey, needle = (dataclasses.replace(kind, depths=TENTHS) for kind in (own.passkey_beacon, own.needle))
        return [
            dataclasses.replace(own, tasks=("passkey_beacon",), lengths=lengths(20), passkey_beacon=passkey, asking=decoded, seed=123),
            dataclasses.replace(own, tasks=("needle",), lengths=lengths(10), needle=needle, asking=decoded),
        ]
    if name == "paper:lost_in_the_middle":
        pairs, documents = dataclasses.replace(own.key_value, pairs=(75, 140, 300)), dataclasses.replace(own.documents, counts=(10, 20, 30))
        often = lambda samples: dataclasses.replace(decoded, samples=samples)
        return [
            dataclasses.replace(own, tasks=("key_value",), asking=often(500), key_value=pairs),
            dataclasses.replace(own, tasks=("documents",), asking=often(2655 if own.documents.file else 500), documents=documents),
        ]
    lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    whole = dataclasses.replace(own.ruler, tasks=tuple(TASKS), samples=500, mode="generate", splitter="punkt", example_budget=500, seed=42)
    return [dataclasses.replace(own, tasks=("ruler",), lengths=lengths, ruler=whole)]
