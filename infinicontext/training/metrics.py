"""What a training run writes down while it runs: metrics.jsonl, TensorBoard, and a line or a bar on the terminal."""

import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter
from tqdm import tqdm

# Dense bfloat16 operations per second of one device, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops() -> float:
    """Operations per second of all devices together; where the device is not in the table (a CPU), what a large float32 matmul reaches."""
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_FLOPS[name] * jax.device_count()
    size = 1024
    multiply = jax.jit(lambda a: a @ a)
    a = jnp.ones((size, size), jnp.float32)
    multiply(a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        times.append(time.perf_counter() - start)
    # All CPU devices of one process share the same cores.
    return 2 * size**3 / min(times)


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard and shows progress. Only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, steps: int, resumed_at: int, name: str):
        """Continues the files of a run resumed at step `resumed_at`; records of later steps are taken back, for they will come again."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_at]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=resumed_at, desc=name, unit="step", disable=not self._terminal)
        self._name, self._steps = name, steps

    def write(self, record: dict[str, float | int | list]) -> None:
        """One record, which has a "step" and may have "gates" by layer and head and other lists; complete on disk before this returns."""
        if not self._active:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        gates, scalars = record.get("gates", []), {key: x for key, x in record.items() if key != "step" and not isinstance(x, list)}
        by_head = {f"gate/{layer}/{head}": gate for layer, heads in enumerate(gates) for head, gate in enumerate(heads)}
        for key, value in (scalars | by_head).items():
            self._board.add_scalar(key, value, record["step"])
        if self._terminal:
            self._bar.set_postfix(
                {key: f"{value:.4g}" for key, value in scalars.items() if key in ("loss", "validation_loss", "tokens_per_second")}
            )
            self._bar.update(record["step"] - self._bar.n)
        else:
            fields = " ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in scalars.items())
            print(f"{self._name} step {record['step']}/{self._steps} {fields}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Waits until all records are on the disk."""
        if self._active:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files and the bar."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()


class Stopwatch:
    """Tokens per second and model FLOP utilisation between two log lines, without validation, saving and compiling."""

    def __init__(self, peak: float):
        """`peak`: operations per second that count as a utilisation of 1."""
        self._peak, self._since, self._tokens, self._flops = peak, None, 0, 0.0

    def start(self) -> None:
        """Begins an interval unless one is running."""
        self._since = time.perf_counter() if self._since is None else self._since

    def count(self, tokens: int, flops: float) -> None:
        """Adds a step."""
        self._tokens += tokens
        self._flops += flops

    def rates(self) -> dict[str, float]:
        """Rates of the steps counted since the last call; ends the interval and begins the next."""
        now = time.perf_counter()
        seconds, tokens, flops = now - self._since, self._tokens, self._flops
        self._since, self._tokens, self._flops = now, 0, 0.0
        return {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / self._peak}

    def pause(self) -> None:
        """Ends the interval; the next begins with the next start."""
        self._since, self._tokens, self._flops = None, 0, 0.0


def read_metrics(path: pathlib.Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that was cut off by a killed process is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
