"""A peer of `muonlm bench train`: the Hugging Face Trainer with Qwen3ForCausalLM, as its documentation sets it up."""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.data import Dataset

from muonlm.bridge.transformers import qwen3_config
from muonlm.config.schema import TrainConfig
from muonlm.data.dataset import TokenDataset
from muonlm.data.loader import BatchOrder


def missing_packages() -> list[str]:
    """What the peer needs and is not installed."""
    return [name for name in ("transformers", "accelerate") if find_spec(name) is None]


class Samples(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a run as the Trainer takes them; Qwen3 shifts the labels by itself."""

    def __init__(self, data: TokenDataset, order: BatchOrder, count: int) -> None:
        self._data, self._indices = data, order.indices(0, count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._data.sequences(self._indices[index : index + 1])[0, :-1])
        return {"input_ids": ids, "labels": ids}


def trainer_seconds(
    config: TrainConfig, data: TokenDataset, order: BatchOrder, *, warm_steps: int, bfloat16: bool
) -> float:
    """Seconds that the steps after the first `warm_steps` of the run take: fused AdamW, clipping, a log every ten."""
    import transformers

    class Clock(transformers.TrainerCallback):
        begin = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.end = time.perf_counter()
            if state.global_step == warm_steps:
                self.begin = self.end

    batch_size, clock = config.loop.batch_size, Clock()
    transformers.set_seed(config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            output_dir=scratch,
            max_steps=config.num_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=bfloat16,
            disable_tqdm=True,
            log_level="error",
        )
        trainer = transformers.Trainer(
            model=transformers.Qwen3ForCausalLM(qwen3_config(config.model, data.vocab_size)),
            args=args,
            train_dataset=Samples(data, order, batch_size * config.num_steps),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.end - clock.begin
