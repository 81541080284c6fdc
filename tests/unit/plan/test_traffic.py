"""What is sent, by hand, and over which links."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muonlm.config.schema import TrainConfig
from muonlm.plan import owners
from muonlm.plan.forecast import Forecast
from muonlm.plan.traffic import Transfer

Make = Callable[..., TrainConfig]
PlanOf = Callable[..., Forecast]


def sent(plan: Forecast) -> dict[tuple[str, str], tuple[int, float]]:
    return {(t.what, t.collective): (t.calls, t.num_bytes) for t in plan.sent}


def test_one_rank_sends_nothing(make: Make, plan_of: PlanOf) -> None:
    assert plan_of(make()).sent == []
    assert plan_of(make(zero=3)).sent == []


def test_ddp_by_hand(make: Make, plan_of: PlanOf) -> None:
    plan = plan_of(make(), 4)
    total, hidden = plan.parameters["total"], plan.parameters["hidden"]
    assert sent(plan)["gradients", "all_reduce"] == (1, 2 * 3 / 4 * 4 * total)
    [exchange] = [t for t in plan.sent if t.is_muons]
    # The matrices of one round, padded to the rank with most of them; fp32 on a CPU.
    assert exchange.collective == "all_gather"
    assert 3 / 4 * 4 * hidden <= exchange.num_bytes <= 1.3 * 3 / 4 * 4 * hidden
    adamw = plan_of(make(**{"optim.kind": "adamw"}), 4)
    assert adamw.sent_bytes() == plan.sent_bytes(muons=False) < plan.sent_bytes()


def test_fsdp_by_hand(make: Make, plan_of: PlanOf) -> None:
    """Everything is gathered, the blocks twice, gradients are reduced in fp32, and 2 (D - 1) / D^2 P b exchanged."""
    plan = plan_of(make(zero=3), 4, "h100-80gb")
    total, hidden = plan.parameters["total"], plan.parameters["hidden"]
    blocks = total - 2 * 4800 - 48
    by_phase = {(t.phase, t.collective): t.num_bytes for t in plan.sent}
    assert by_phase["forward", "all_gather"] == 3 / 4 * 2 * total
    assert by_phase["backward", "all_gather"] == 3 / 4 * 2 * blocks
    assert by_phase["backward", "reduce_scatter"] == 3 / 4 * 4 * total
    assert by_phase["optimizer", "all_to_all"] == pytest.approx(2 * 3 / 16 * 2 * hidden)
    kept = plan_of(make(zero=3, reshard_after_forward=False), 4, "h100-80gb")
    assert plan.sent_bytes() - kept.sent_bytes() == 3 / 4 * 2 * blocks


def test_micro_batches_gather_and_reduce_anew(make: Make, plan_of: PlanOf) -> None:
    """Copies of the model sum what the shards have added up, once a step."""
    once, twice = (
        sent(plan_of(make(zero=3, replicas=2, **{"loop.micro_batch_size": size}), 4, "h100-80gb")) for size in (2, 1)
    )
    for key in (("parameters", "all_gather"), ("gradients", "reduce_scatter")):
        assert twice[key] == tuple(2 * value for value in once[key])
    assert twice["gradients", "all_reduce"] == once["gradients", "all_reduce"]


def test_more_ranks_exchange_less(make: Make, plan_of: PlanOf) -> None:
    bytes_of = [plan_of(make(zero=3, **{"loop.batch_size": 64}), n).sent_bytes(muons=True) for n in (2, 4, 8, 16)]
    assert bytes_of == sorted(bytes_of, reverse=True)


def test_experts_that_are_dealt_out_whole_need_no_exchange(make: Make, plan_of: PlanOf) -> None:
    whole = plan_of(make("moe", zero=3, expert_parallel=4, **{"loop.batch_size": 16}), 8)
    cut = plan_of(make("moe", zero=3, expert_parallel=4, **{"loop.batch_size": 16}), 16)
    assert whole.grid["expert"] == 4
    dense = 4 * sum(s for s in (whole.parameters["hidden"],)) * 2 * 7 / 64
    assert whole.sent_bytes(muons=True) == pytest.approx(dense, rel=0.01)
    assert cut.sent_bytes(muons=True) > whole.sent_bytes(muons=True)


def test_stacks_that_are_cut_between_experts_stay_where_they_are(make: Make, plan_of: PlanOf) -> None:
    """With more ranks than experts too, though half of the ranks then have none to compute."""
    plan = plan_of(make("moe", zero=3, **{"loop.batch_size": 16, "model.expert_size": 256}), 16)
    assert plan.sent_bytes(muons=True) == pytest.approx(plan.parameters["hidden"] * 4 * 2 * 15 / 256, rel=0.01)
    assert plan.owners.imbalance > 1.3


def test_zero_without_a_plan_of_its_buckets(make: Make, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_of(make(zero=2), 4)
    monkeypatch.setattr(owners, "_MOST_BUCKET_WORK", 0)
    rough = plan_of(make(zero=2), 4)
    assert planned.sent_bytes(muons=True) == rough.sent_bytes(muons=True) == 0
    assert rough.sent_bytes() == pytest.approx(planned.sent_bytes(), rel=0.2)
    assert rough.memory.weights == pytest.approx(planned.memory.weights, rel=0.2)
    assert rough.memory.optimizer_state == pytest.approx(planned.memory.optimizer_state, rel=0.2)


@pytest.mark.parametrize(
    ("size", "stride", "per_node", "share"),
    [
        (8, 1, 8, 0),  # within a node
        (4, 2, 8, 0),
        (16, 1, 8, 1 / 8),  # two of sixteen links of the ring cross
        (4, 8, 8, 1),  # one rank of each node
        (4, 4, 8, 1 / 2),
        (16, 1, 1, 1),
    ],
)
def test_links_of_a_ring(size: int, stride: int, per_node: int, share: float) -> None:
    transfer = Transfer("forward", "x", "all_gather", 1, 160.0, size, stride)
    assert transfer.between_nodes(per_node) == 160 * share


def test_links_of_an_all_to_all() -> None:
    transfer = Transfer("forward", "x", "all_to_all", 1, 150.0, 16, 1)
    assert transfer.between_nodes(8) == 150 * 8 / 15
    assert transfer.between_nodes(16) == 0
