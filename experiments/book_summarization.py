"""Summaries of books: a model reads a book in one stream and learns, with a loss on the summary alone, to say what happens in it.

The ten very short books that come with the library show that all of it runs, offline: a byte-level model with Infini-attention, 0.2 million
parameters, reads up to 1,024 bytes of a book. Eight are trained on and two held out, so the scores say nothing about summarising.

    infinicontext train experiments/book_summarization.py:tiny --workdir runs/books
    infinicontext eval runs/books --tasks summarisation --lengths 256 512 1k --evaluation.summarisation.predictions True
    infinicontext compare runs/books --output report/

Cost: training took 4 minutes on 2 busy CPU cores (4,300 tokens/s), the evaluation 13 seconds.

Result: one seed: the loss on summaries of the held-out books is 3.4 nats per byte. Their ROUGE-1 and ROUGE-L are 0.12 and 0.09 after 256
bytes (28% of a book is read), 0.12 and 0.07 after 512 (63%), 0.17 and 0.13 after 1,024 (all of it); no pair of words is right, so ROUGE-2
and with it the overall score are 0.

Your own books (data/books.py says what a line holds): --data.source mine.jsonl. As in the paper's section 4.3, a pretrained Transformer is
given a memory, tuned on long inputs and asked at longer ones. An experiment of your own:

    import dataclasses
    from infinicontext import pretrained

    def mine() -> Experiment:
        folder = "Llama-3.2-1B"  # config.json, safetensors and tokenizer.json
        base = dataclasses.replace(pretrained.read_config(folder), dtype="bfloat16")
        return Experiment(
            name="mine",
            model=InfiniConfig.of(base, segment=2048, update="linear", empty_memory="bypass", gate_init=-3.0),
            data=BookData("booksum.jsonl", tokenizer=folder, length=32768),
            objective=NextToken(loss="answers"),
            optimizer=OptimizerConfig(learning_rate=1e-5),
            evaluation=Evaluation(tasks=("summarisation",), lengths=(16384, 65536, 262144, 524288), summarisation=PAPER),
            start_from=folder,
            batch_size=8,
        )

Overall ROUGE by input length is the paper's figure 4: infinicontext eval runs/mine --lengths 16k 64k 256k 512k, then compare.
"""

from infinicontext.data.books import BookData
from infinicontext.evaluation.suite import Evaluation
from infinicontext.evaluation.summarisation import SummarisationEvaluation
from infinicontext.experiment import Experiment
from infinicontext.models.infini_attention import InfiniConfig
from infinicontext.objectives.next_token import NextToken
from infinicontext.training.optimizer import OptimizerConfig

PAPER = SummarisationEvaluation(books=100, max_new_tokens=1024, temperature=0.5, top_p=0.95)


def tiny() -> Experiment:
    """Trains on eight very short books."""
    return Experiment(
        name="books",
        model=InfiniConfig(vocab_size=257, dim=64, layers=3, heads=4, segment=128, remat=False),
        data=BookData(source="examples", tokenizer="bytes", length=1088),
        objective=NextToken(loss="answers", context_weight=0.3),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        evaluation=Evaluation(tasks=("summarisation", "perplexity"), lengths=(256, 512, 1024), segment=256),
        steps=100,
        batch_size=8,
        validation_every=20,
        checkpoint_every=50,
    )
