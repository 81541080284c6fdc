"""A training loop whose losses are known in closed form: comparisons of seconds, with run directories as real ones.

The end loss of a run of T tokens is A - B ln(k T) + curvature of the learning rates, with k the token efficiency of the
optimizer: Muon needs 1/RATIO of AdamW's tokens for the same loss, exactly, at every loss.
"""

from __future__ import annotations

import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from muonlm.compare.workers import Outcome
from muonlm.config.compare import CompareConfig
from muonlm.config.load import dump_toml, validate
from muonlm.config.schema import TrainConfig

RATIO = 1.25
NOISE = 0.0
"""Standard deviation of the end loss of a run beyond what both optimizers of a seed share."""
BEST = {"adamw": (2e-3, 6.4e-2), "muon": (4e-3, 3.2e-2)}
BASE = """
name = "base"
[data]
path = "data/text"
seq_len = 128
[model]
vocab_size = 1024
[loop]
tokens = 1048576
batch_size = 16
"""


def end_loss(kind: str, tokens: float, lr: float, aux_lr: float, seed: int) -> float:
    """Loss at the end of a fully decayed run; the seed shifts both optimizers alike."""
    best_lr, best_aux = BEST[kind]
    efficiency = RATIO if kind == "muon" else 1.0
    noise = random.Random(f"{kind}{seed}").gauss(0, NOISE)
    detuning = 0.05 * math.log2(lr / best_lr) ** 2 + 0.02 * math.log2(aux_lr / best_aux) ** 2
    return 8.0 - 0.34 * math.log(tokens * efficiency) + detuning + random.Random(seed).gauss(0, 0.01) + noise


class FakeTraining:
    """Stands in for `workers.run_trial`. `calls` lists the run directories trained, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.diverging_lr = math.inf
        self.stop_after = math.inf
        self.lock = threading.Lock()

    def __call__(self, config: TrainConfig) -> Outcome:
        with self.lock:
            self.calls.append(config.resolved_run_dir)
            if len(self.calls) > self.stop_after:
                return Outcome("preempted")
        run = Path(config.resolved_run_dir)
        run.mkdir(parents=True, exist_ok=True)
        if config.optim.lr >= self.diverging_lr:
            (run / "config.toml").write_text(dump_toml(config))
            return Outcome("failed", error="non-finite gradient in layers.0.mlp.down_proj.weight")
        write_run(run, config)
        status = json.loads((run / "status.json").read_text())
        return Outcome("finished", status["final_loss"], status["seconds"], status["tokens"])


def write_run(run: Path, config: TrainConfig) -> None:
    """A finished run directory: config, environment, metrics, status."""
    kind, lr, aux_lr = config.optim.kind, config.optim.lr, config.optim.aux.lr
    rng = random.Random(f"{config.seed}{kind}{lr}")
    step_s = 0.085 if kind == "muon" else 0.075
    share = 0.16 if kind == "muon" else 0.03
    records: list[dict] = []
    last = config.num_steps
    for step in range(1, last + 1):
        tokens = step * config.batch_tokens
        decayed = min(1.0, (last - step) / (0.4 * last))
        mean = end_loss(kind, tokens, lr, aux_lr, config.seed) + 0.12 * decayed + 2.0 * math.exp(-step / 40)
        common = {"schema": 1, "step": step, "tokens": tokens, "time_s": step * step_s}
        if step % 10 == 0 or step == last:
            norms = {"hidden": 0.8 + rng.random() / 5, "embedding": 0.3, "head": 0.25, "norm": 0.02}
            rates = {"hidden": lr * decayed, "embedding": aux_lr * decayed}
            records.append(
                common
                | {"kind": "train", "loss": mean + rng.gauss(0, 0.05), "step_s": step_s, "clip_factor": 1.0}
                | {"tokens_per_s": config.batch_tokens / step_s, "optimizer_s": share * step_s, "lr": rates}
                | {"optimizer_share": share, "grad_norm": 1.1 * math.exp(-step / 400), "grad_norms": norms}
                | {"update_norms": {k: v * decayed for k, v in norms.items()}, "update_rms": norms}
            )
        if step % 32 == 0 or step == last:
            evaluation = {"kind": "eval", "loss": mean, "bits_per_byte": mean / 3, "eval_tokens": 8192}
            records.append(common | evaluation | {"final": False})
    final = end_loss(kind, last * config.batch_tokens, lr, aux_lr, config.seed)
    records.append(
        {"schema": 1, "kind": "eval", "step": last, "tokens": last * config.batch_tokens, "time_s": last * step_s}
        | {"loss": final, "bits_per_byte": final / 3, "eval_tokens": 65536, "final": True}
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "config.toml").write_text(dump_toml(config))
    (run / "environment.json").write_text(
        json.dumps({"versions": {"torch": "2.13.0", "python": "3.11.2"}, "device": "cpu", "threads": 1})
    )
    status = {"schema": 1, "state": "finished", "step": last, "num_steps": last, "attempt": 1, "error": None}
    status |= {"tokens": last * config.batch_tokens, "final_loss": final, "seconds": last * step_s}
    (run / "status.json").write_text(json.dumps(status))


def make_config(directory: Path, **changes: object) -> CompareConfig:
    """A comparison of AdamW and Muon below `directory` whose optima are interior; `changes` replace its keys."""
    base = directory / "base.toml"
    base.write_text(BASE)
    arms = [
        {"name": "adamw", "set": {"optim.kind": "adamw"}, "lr": [5e-4, 1e-3, 2e-3, 4e-3]},
        {"name": "muon", "set": {"optim.kind": "muon"}, "lr": [1e-3, 2e-3, 4e-3, 8e-3]},
    ]
    for arm, aux in zip(arms, ([3.2e-2, 6.4e-2, 1.28e-1], [1.6e-2, 3.2e-2, 6.4e-2])):
        arm["aux_lr"] = aux
    arms[1]["budgets_tokens"] = [786432, 917504, 1048576]
    raw = {"name": "synthetic", "output_dir": str(directory / "out"), "base": str(base), "arms": arms}
    raw |= {"reference": "adamw", "budgets_tokens": [1048576], "seeds": [0, 1, 2], "jobs": 2}
    return validate(CompareConfig, raw | changes, "test")


def thread_pool(jobs: int, stop: object, log: Path) -> ThreadPoolExecutor:
    """Stands in for `workers.make_pool`: the fake training needs no process."""
    return ThreadPoolExecutor(jobs)
