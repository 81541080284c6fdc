"""What must be so for Muon under DeepSpeed to train what it says: the version, and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from muonlm.config.errors import UserError

# Each was compared with one process by tests/dist/bridge.
TESTED = ("0.19.8",)


def check_version() -> None:
    """Raise UserError for versions of DeepSpeed that were not compared with one process."""
    import deepspeed

    if deepspeed.__version__.split("+")[0] not in TESTED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__}: Muon under DeepSpeed reads how DeepSpeed lays out its partitions, "
            f"which changes between versions, and was tested with {', '.join(TESTED)}; "
            f"pip install deepspeed=={TESTED[-1]}"
        )


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UserError that lists what in a DeepSpeed configuration trains something else than Muon, or is untested.

    `config` is what is given to `deepspeed.initialize`, as a dict. Each key comes with the reason and what to do.
    `bind` calls this; before `deepspeed.initialize` it saves the wait.
    """
    problems = [f"  {key}: {reason}" for key, is_wrong, reason in _REFUSED if is_wrong(config)]
    if problems:
        raise UserError("the DeepSpeed configuration does not go with Muon:\n" + "\n".join(problems))


def _at(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return default
        value = value.get(key, default)
    return default if value is None else value


def _is_on(path: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the value there, or `enabled` in it, is neither false nor 0; a section without `enabled` is on."""

    def check(config: Mapping[str, Any]) -> bool:
        value = _at(config, path)
        return bool(value.get("enabled", True) if isinstance(value, Mapping) else value)

    return check


def _number(config: Mapping[str, Any], path: str, default: float) -> float:
    """The number there. "auto", which accelerate fills in later, counts as the default; DeepSpeed refuses the rest."""
    value = _at(config, path, default)
    return value if isinstance(value, int | float) else default


def _name(config: Mapping[str, Any]) -> str:
    return str(_at(config, "optimizer.type", "")).lower()


_QUANTIZED = ("weights", "nontrainable_weights", "gradients")
# Key, whether it is refused, and the reason; those about DeepSpeed's own Muon are measured in docs/deepspeed.md.
_REFUSED: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str], ...] = (
    (
        "optimizer.type=Muon",
        lambda c: _name(c) == "muon",
        "DeepSpeed tags parameters for its own Muon, and would orthogonalize gradients before they reach the "
        'optimizer. Remove "optimizer": its settings are those of muon_for_deepspeed',
    ),
    (
        "gradient_clipping",
        lambda c: _name(c) == "muon" and _number(c, "gradient_clipping", 0) > 0,
        "DeepSpeed's own Muon in stages 1 to 3 clips the orthogonalized update, whose norm grows with the root of the "
        'model\'s width times its depth: the learning rate is divided by that. Remove "optimizer": with '
        "muon_for_deepspeed the gradients are clipped, before they are orthogonalized",
    ),
    (
        "optimizer",
        lambda c: bool(_at(c, "optimizer")) and _name(c) != "muon",
        "DeepSpeed ignores it where an optimizer is given, so that its settings would not be those that train. Remove "
        "it, and give them to muon_for_deepspeed",
    ),
    (
        "zero_optimization.stage",
        lambda c: _number(c, "zero_optimization.stage", 0) == 0,
        "stage 0 shards nothing, so there is nothing to bind. Set 1, 2 or 3, or give "
        "muonlm.optim.build.build_optimizer(model, config) to deepspeed.initialize and do not bind",
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        lambda c: _number(c, "zero_optimization.zero_hpz_partition_size", 1) > 1,
        "secondary partitions are not tested. Leave it at 1",
    ),
    (
        "zero_optimization.zero_quantized_weights, zero_quantized_nontrainable_weights, zero_quantized_gradients",
        lambda c: any(_is_on(f"zero_optimization.zero_quantized_{kind}")(c) for kind in _QUANTIZED),
        "what is quantized on its way trains something else than one process. Remove them",
    ),
    (
        "zero_optimization.mics_shard_size",
        lambda c: _number(c, "zero_optimization.mics_shard_size", -1) > 0,
        "MiCS shards over a part of the ranks, and Muon needs all. Remove it",
    ),
    (
        "zero_optimization.offload_optimizer.device=nvme",
        lambda c: _at(c, "zero_optimization.offload_optimizer.device") == "nvme",
        "partitions on NVMe are not tested. Set it to cpu, or remove it",
    ),
    (
        "zero_optimization.offload_param.device=nvme",
        lambda c: _at(c, "zero_optimization.offload_param.device") == "nvme",
        "parameters on NVMe are not tested. Set it to cpu, or remove it",
    ),
    (
        "zero_optimization.offload_optimizer.ratio",
        lambda c: _number(c, "zero_optimization.offload_optimizer.ratio", 1) != 1,
        "what stays on the GPU would be trained by another optimizer, an AdamW of DeepSpeed's. Remove it",
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        _is_on("zero_optimization.offload_optimizer.super_offload"),
        "its steps run on a CPU optimizer of DeepSpeed's own. Remove it",
    ),
    (
        "zero_optimization.zenflow",
        _is_on("zero_optimization.zenflow"),
        "it updates the important gradients with an AdamW of DeepSpeed's own. Remove it",
    ),
    (
        "zero_optimization.legacy_stage1",
        _is_on("zero_optimization.legacy_stage1"),
        "DeepSpeed has it no more. Remove it",
    ),
    (
        "zero_optimization.stage3_module_granularity_threshold, leaf_module",
        lambda c: (
            _number(c, "zero_optimization.stage3_module_granularity_threshold", 0) > 0
            or bool(_at(c, "zero_optimization.leaf_module"))
        ),
        "modules that are gathered as a whole are not tested, and fail in the backward pass. Remove them",
    ),
    (
        "compile.deepcompile",
        _is_on("compile.deepcompile"),
        "it moves parameters and gradients in ways that are not tested. Remove it",
    ),
)


def check_engine(engine: Any) -> None:
    """Raise UserError where an engine's configuration is one that `check_config` refuses."""
    check_config(engine._config._param_dict)
