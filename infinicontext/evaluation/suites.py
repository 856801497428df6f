"""Sets of evaluations by name: a quick look, the usual ones, and the settings of one paper."""

import dataclasses

import numpy as np

from infinicontext.data.images import ImageData
from infinicontext.data.pipeline import CorpusData
from infinicontext.data.recall import RecallData
from infinicontext.errors import UserError
from infinicontext.evaluation.document_perplexity import DocumentPerplexityEvaluation
from infinicontext.evaluation.lost_in_the_middle import KeyValue
from infinicontext.evaluation.passkey import PasskeyEvaluation
from infinicontext.evaluation.passkey_texts import BeaconPasskey
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment

SUITES = ("smoke", "standard", "paper:infini", "paper:longrope", "paper:beacon", "paper:lost_in_the_middle", "paper:ruler")
STANDARD = (4096, 8192, 16384, 32768)
TENTHS = tuple(int(depth) / 100 for depth in np.linspace(0, 100, 10))


def suite(name: str, experiment: Experiment) -> list[Evaluation]:
    """What a name stands for, one after another; fields that a suite does not set are those of the experiment.

    smoke: minutes on a CPU, at one to four times the training length. standard: RULER, passkeys, needles, key-value retrieval, BABILong and
    perplexities from 4K to 32K. paper:NAME: what that paper measured. Tasks that need a corpus are left out where the data are none.

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
    if name == "smoke":
        length = experiment.train_length
        forced = dataclasses.replace(own.asking, mode="teacher_forced")
        quick = dataclasses.replace(own.ruler, tasks=("niah_single_1", "vt", "fwe"), samples=5, example_budget=2000)
        return [
            dataclasses.replace(own, tasks=("passkey", *perplexities), lengths=(length, 2 * length, 4 * length)),
            dataclasses.replace(own, tasks=("magic_number", "ruler"), lengths=(512, 1024), asking=forced, ruler=quick),
        ]
    if name == "standard":
        tasks = ("ruler", "passkey_beacon", "magic_number", "key_value", "babilong", *perplexities)
        facts = ("qa1", "qa2", "qa3", "qa4", "qa5") if own.babilong.facts else ("qa1", "qa2", "qa3")
        babilong = dataclasses.replace(own.babilong, tasks=facts)
        return [dataclasses.replace(own, tasks=tasks, lengths=STANDARD, key_value=KeyValue((75, 140)), babilong=babilong)]
    if name == "paper:infini":
        lengths = (32768, 131072, 262144, 524288, 1048576)
        return [dataclasses.replace(own, tasks=("passkey",), lengths=lengths, passkey=PasskeyEvaluation((0.0, 0.5, 1.0)))]
    if name == "paper:longrope":
        sliding = DocumentPerplexityEvaluation(protocol="sliding", stride=256, windows=10)
        lengths = tuple(4096 * 2**i for i in range(10))
        tasks = ("passkey_landmark", *(("document_perplexity",) if perplexities else ()))
        return [dataclasses.replace(own, tasks=tasks, lengths=lengths, document_perplexity=sliding, seed=42)]
    if name == "paper:beacon":
        lengths = lambda count: tuple(int(length) for length in np.linspace(8192, 131072, count))
        found = [
            dataclasses.replace(own, tasks=("passkey_beacon",), lengths=lengths(20), passkey_beacon=BeaconPasskey(TENTHS), seed=123),
            dataclasses.replace(own, tasks=("needle",), lengths=lengths(10), needle=dataclasses.replace(own.needle, depths=TENTHS)),
        ]
        if perplexities:
            strided = DocumentPerplexityEvaluation(protocol="sliding", documents=100, stride=2048)
            found.append(dataclasses.replace(own, tasks=("document_perplexity",), lengths=STANDARD, document_perplexity=strided))
        return found
    if name == "paper:lost_in_the_middle":
        return [dataclasses.replace(own, tasks=("key_value", "documents"), asking=dataclasses.replace(own.asking, samples=500))]
    lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    return [dataclasses.replace(own, tasks=("ruler",), lengths=lengths, ruler=dataclasses.replace(own.ruler, samples=500))]
