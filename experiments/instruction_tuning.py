"""Instruction tuning: a model learns to answer, with a loss on the answers alone.

A byte-level model with a window, 0.4 million parameters, on the 60 short questions and answers that come with the library: five ways to
ask for the opposite of twelve words. Of the pairs of a word and a way to ask, 16 are held out.

    infinicontext train experiments/instruction_tuning.py:tiny --workdir runs/tiny
    infinicontext generate $'User: What is the opposite of hot?\nAssistant:' --model runs/tiny
    infinicontext sweep experiments/instruction_tuning.py:all --workdir runs/instruction_tuning

Cost: the sweep, two runs, took 39 seconds on 2 CPU cores (8,500 tokens/s in training).

Result, mean and standard deviation of two seeds on the 16 held-out questions: the loss of answers falls from 6.25 +- 0.05 nats per byte
before training to 0.038 +- 0.002 after; greedy `generate` gives 78 +- 4% of the answers to the last letter and stops there.

Your own conversations (data/instructions.py says what a line holds): --data.source mine.jsonl. To tune a pretrained model on them, an
experiment of your own:

    from infinicontext import pretrained

    def mine() -> Experiment:
        folder = "Qwen2.5-0.5B"  # config.json, safetensors and tokenizer.json
        return Experiment(
            name="mine",
            model=dataclasses.replace(pretrained.read_config(folder), dtype="bfloat16"),
            data=InstructionData("mine.jsonl", tokenizer=folder, template="chatml", length=2048),
            objective=NextToken(loss="answers"),
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50),
            start_from=folder,
            steps=1000,
        )

Its loss at step 0 is that of the pretrained model: --steps 1 --optimizer.learning-rate 0 and a --workdir of its own tell it. `generate`
takes prompts in the template's form and stops where answers end.
"""

import dataclasses

from infinicontext.data.instructions import InstructionData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig


def tiny() -> Experiment:
    """Answers five questions about twelve words with their opposites."""
    return Experiment(
        name="tiny",
        model=TransformerConfig(vocab_size=257, dim=96, layers=3, heads=4, attention="window", window=64, remat=False),
        data=InstructionData(source="examples", tokenizer="bytes", template="plain", length=256, validation_fraction=0.2),
        objective=NextToken(loss="answers"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        evaluation=Evaluation(tasks=("perplexity",), lengths=(256, 1024)),
        steps=100,
        batch_size=8,
        validation_every=20,
        checkpoint_every=50,
    )


def all() -> list[Experiment]:
    """Two seeds."""
    return [dataclasses.replace(tiny(), name=f"tiny-seed{seed}", seed=seed) for seed in range(2)]
