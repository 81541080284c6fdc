"""Muon prepared by accelerate trains what `muonlm train` trains; what accelerate ignores silently is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from muonlm.bridge.deepspeed.training import import_deepspeed
from muonlm.config.errors import UserError

TOLERANCE = 1e-5
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def fsdp(version: int = 2) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )


def deepspeed() -> Any:
    from accelerate import DeepSpeedPlugin

    import_deepspeed(torch.device("cpu"))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return DeepSpeedPlugin(hf_ds_config=config)


def gloo() -> Any:
    from accelerate.utils import InitProcessGroupKwargs

    return InitProcessGroupKwargs(backend="gloo")


def trained(
    tiny: Any, hf: Any, size: int, way: str, *, accumulate: int = 1, steps: int = 20, save: Any = None, load: Any = None
) -> dict[str, Any]:
    """Losses and final state of a loop of accelerate on the batches of the run, `steps` of them from `load` on."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from muonlm.bridge.accelerate import prepare

    if way == "fsdp":
        hf.shard_on_cpu()
    accelerator: Any = {
        "ddp": lambda: Accelerator(cpu=True, gradient_accumulation_steps=accumulate),
        "fsdp": lambda: Accelerator(fsdp_plugin=fsdp(), gradient_accumulation_steps=accumulate),
        "deepspeed": lambda: Accelerator(deepspeed_plugin=deepspeed(), kwargs_handlers=[gloo()]),
    }[way]()
    loader = DataLoader(tiny.samples(tiny.config.num_steps), batch_size=tiny.batch // size // accumulate)
    clip = 0.0 if way == "deepspeed" else tiny.grad_clip
    model, optimizer, loader = prepare(accelerator, tiny.model(), loader, grad_clip=clip, **hf.settings)
    if load is not None:
        accelerator.load_state(str(load))
        loader = accelerator.skip_first_batches(loader, (tiny.config.num_steps - steps) * accumulate)
    losses: list[float] = []
    sums = torch.zeros(1)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            sums += accelerator.reduce(loss.detach(), "mean") / accumulate
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(sums.item())
            sums.zero_()
        if len(losses) == steps:
            break
    if save is not None:
        accelerator.save_state(str(save))
    return {
        "losses": losses,
        "is_sharded": any(isinstance(p, DTensor) for p in model.parameters()),
        "state": None if way == "deepspeed" else hf.state_of(model, optimizer),
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_same_as_muonlm_train(run_ranks, tiny, hf, own_loop, way) -> None:
    """Also with gradients accumulated over two passes."""
    own = own_loop()
    for result in run_ranks(lambda rank, size: trained(tiny, hf, size, way, accumulate=2), 2, join=False):
        assert result["is_sharded"] == (way == "fsdp")
        difference = np.abs(np.subtract(result["losses"], own["losses"]))
        print("largest difference of a loss", difference.max())
        assert difference.shape == (20,)
        assert difference.max() < TOLERANCE
        assert_same(result["state"], own["state"], 1e-4)


@pytest.mark.slow
def test_deepspeed_is_bound(run_ranks, tiny, hf, own_loop) -> None:
    pytest.importorskip("deepspeed")
    tiny.config = tiny.config.model_copy(update={"loop": tiny.config.loop.model_copy(update={"grad_clip": 0.0})})
    own = own_loop()
    for result in run_ranks(lambda rank, size: trained(tiny, hf, size, "deepspeed"), 2, join=False, timeout_s=120):
        assert np.abs(np.subtract(result["losses"], own["losses"])).max() < TOLERANCE


def test_deepspeed_must_be_told_how_to_clip(run_ranks, tiny, hf) -> None:
    """accelerate fills in 1.0."""
    pytest.importorskip("deepspeed")

    def run(rank: int, size: int) -> None:
        from accelerate import Accelerator

        from muonlm.bridge.accelerate import prepare

        plugin = deepspeed()
        del plugin.deepspeed_config["gradient_clipping"]
        prepare(Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo()]), tiny.model(), **hf.settings)

    with pytest.raises(UserError, match="accelerate puts 1"):
        run_ranks(run, 2, join=False)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_saved_state_goes_on_bit_for_bit(run_ranks, tiny, hf, tmp_path, way) -> None:
    def run(rank: int, size: int, **options: Any) -> dict[str, Any]:
        return trained(tiny, hf, size, way, **options)

    whole = run_ranks(run, 2, join=False)[0]
    run_ranks(lambda rank, size: run(rank, size, steps=12, save=tmp_path / "at-12"), 2, join=False)
    rest = run_ranks(lambda rank, size: run(rank, size, steps=8, load=tmp_path / "at-12"), 2, join=False)[0]
    assert rest["losses"] == whole["losses"][12:]
    assert_same(rest["state"], whole["state"], 0.0)


def refused(rank: int, size: int, way: str) -> str:
    """What is said of a way of starting that does something else than it seems."""
    from accelerate import Accelerator

    from muonlm.bridge.accelerate import check_accelerator

    if way == "FSDP1":
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if way == "launcher":
        for name in ENVIRONMENT:
            os.environ.pop(name)
        # What `accelerate launch --cpu --num_processes 2` leaves; the slow test starts it.
        os.environ |= {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    options: Any = {
        "launcher": {},
        "not on CPUs": {},
        "FSDP with cpu=True": {"cpu": True, "fsdp_plugin": fsdp() if way.startswith("FSDP w") else None},
        "DeepSpeed with cpu=True": {"cpu": True, "deepspeed_plugin": deepspeed() if way.startswith("Deep") else None},
        "DeepSpeed without a backend": {"deepspeed_plugin": deepspeed() if way.startswith("Deep") else None},
        "backend alone": {"kwargs_handlers": [gloo()]},
        "FSDP1": {"fsdp_plugin": fsdp(1) if way == "FSDP1" else None},
    }[way]
    accelerator = Accelerator(**options)
    try:
        check_accelerator(accelerator)
    except UserError as error:
        return str(error)
    return f"accepted as {accelerator.distributed_type}"


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("launcher", "has started one"),
        ("not on CPUs", "WORLD_SIZE says that 2 processes were started, and accelerate knows of 1"),
        ("FSDP with cpu=True", "FSDP was asked for and has no effect"),
        ("DeepSpeed with cpu=True", "DeepSpeed was asked for and has no effect"),
        ("DeepSpeed without a backend", "each would train a model of its own"),
        ("backend alone", "would not average gradients"),
        ("FSDP1", "flattens parameters"),
    ],
)
def test_refuses_what_has_another_effect(run_ranks, way, message) -> None:
    if "DeepSpeed" in way:
        pytest.importorskip("deepspeed")
    for said in run_ranks(lambda rank, size: refused(rank, size, way), 2, join=False):
        assert message in said


def test_accepts_what_works(run_ranks) -> None:
    """One process started by hand, one by the launcher, and two by torchrun."""
    from accelerate import Accelerator

    from muonlm.bridge.accelerate import check_accelerator

    def check(rank: int, size: int, launcher: bool) -> int:
        if size == 1:
            for name in ENVIRONMENT:
                os.environ.pop(name)
        if launcher:
            os.environ |= {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
        check_accelerator(accelerator := Accelerator(cpu=True))
        return int(accelerator.num_processes)

    assert run_ranks(lambda rank, size: check(rank, size, False), 1, join=False) == [1]
    assert run_ranks(lambda rank, size: check(rank, size, True), 1, join=False) == [1]
    assert run_ranks(lambda rank, size: check(rank, size, False), 2, join=False) == [2, 2]


@pytest.mark.slow
def test_launcher_that_starts_one_process_of_two(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator\nfrom muonlm.bridge.accelerate import check_accelerator\n"
        "check_accelerator(Accelerator())\nprint('accepted')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    for count in (1, 2):
        done = subprocess.run([*command, str(count), str(script)], env=environment, capture_output=True, text=True)
        assert ("accepted" in done.stdout) == (count == 1), done.stderr
        assert ("accelerate launch was asked for several processes" in done.stderr) == (count == 2)
