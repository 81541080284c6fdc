"""What would train something else than Muon under DeepSpeed is refused, with the key, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from muonlm.bridge.deepspeed import bind, check_config, muon_for_deepspeed
from muonlm.config.errors import UserError

OnRanks = Callable[..., list[Any]]
GOOD: dict[str, Any] = {
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "zero_hpz_partition_size": 1,
        "offload_optimizer": {"device": "cpu", "ratio": 1.0},
        "offload_param": {"device": "cpu"},
    },
}
BAD: dict[str, dict[str, Any]] = {
    "optimizer.type=Muon": {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}},
    "gradient_clipping": {"optimizer": {"type": "muon"}, "gradient_clipping": 1.0},
    "optimizer": {"optimizer": {"type": "AdamW"}},
    "zero_optimization.stage": {"zero_optimization": {}},
    "zero_optimization.zero_hpz_partition_size": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "zero_optimization.mics_shard_size": {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
    "zero_optimization.offload_optimizer.device=nvme": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    },
    "zero_optimization.offload_param.device=nvme": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}
    },
    "zero_optimization.offload_optimizer.ratio": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}
    },
    "zero_optimization.offload_optimizer.super_offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    },
    "zero_optimization.zenflow": {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
    "zero_optimization.legacy_stage1": {"zero_optimization": {"stage": 1, "legacy_stage1": True}},
    "zero_optimization.stage3_module_granularity_threshold, leaf_module": {
        "zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}
    },
    "zero_optimization.zero_quantized_weights, zero_quantized_nontrainable_weights, zero_quantized_gradients": {
        "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}
    },
    "compile.deepcompile": {"compile": {"deepcompile": True}},
}


@pytest.mark.parametrize("key", BAD)
def test_refused_with_the_key_and_a_remedy(key: str) -> None:
    with pytest.raises(UserError, match=r"(Set|Remove|Leave)") as caught:
        check_config({**GOOD, **BAD[key]})
    assert f"\n  {key}: " in str(caught.value)


def test_all_problems_are_listed_and_a_good_configuration_has_none() -> None:
    check_config(GOOD)
    with pytest.raises(UserError) as caught:
        check_config(BAD["gradient_clipping"] | {"zero_optimization": {"stage": 0}})
    assert str(caught.value).count("\n  ") == 3


def test_engines_that_muon_must_not_be_bound_to(
    gpt: SimpleNamespace, on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, another optimizer, a changed model, and DeepSpeed's own Muon beside ours."""
    import deepspeed
    import torch

    def engine(given: Any, model: Any, **keys: Any) -> Any:
        return deepspeed.initialize(model=model, optimizer=given, config={**gpt.config(1), **keys})[0]

    def body(rank: int, world: int) -> None:
        model = gpt.new_model()
        with pytest.raises(UserError, match="is SGD; give what muon_for_deepspeed returns"):
            bind(engine(torch.optim.SGD(model.parameters()), model))
        model = gpt.new_model()
        good = engine(muon_for_deepspeed(model, **gpt.muon), model)
        with monkeypatch.context() as patch:
            patch.setattr(deepspeed, "__version__", "0.20.0")
            with pytest.raises(UserError, match=r"0\.20\.0: .* was tested with 0\.19\.8"):
                bind(good)
        bind(good)
        model = gpt.new_model()
        tagged = engine(muon_for_deepspeed(model, **gpt.muon), model, optimizer={"type": "Muon", "params": {}})
        with pytest.raises(UserError, match=r"optimizer\.type=Muon"):
            bind(tagged)
        model = gpt.new_model()
        list(model.parameters())[3].use_muon = True
        with pytest.raises(UserError, match="carries `use_muon`"):
            bind(engine(muon_for_deepspeed(model, **gpt.muon), model))

    on_ranks(body, 1)


def test_options_that_do_not_exist(gpt: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="learning_rate"):
        muon_for_deepspeed(gpt.new_model(), learning_rate=1.0)
