"""How the ranks of a run are arranged, from the configuration and their number alone. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from muonlm.config.errors import UserError
from muonlm.config.schema import MoEConfig, TrainConfig


class RankGrid(NamedTuple):
    """Numbers of ranks along each axis; rank = (replica * shard + its shard) * tensor + its place in the tensor group.

    `replicate` counts copies of the model, `shard` the parts that each copy is cut into by FSDP2, and `tensor` the
    ranks that share the matrices of a layer. Of the `shard` ranks of a copy, `expert` neighbours hold different experts
    and send each other tokens; each expert is cut over the shard / expert of them that hold it.
    """

    replicate: int
    shard: int
    tensor: int
    expert: int = 1

    @property
    def data(self) -> int:
        """Number of ranks, or groups of them, that read different sequences."""
        return self.replicate * self.shard


def rank_grid(config: TrainConfig, world_size: int) -> RankGrid:
    """The arrangement that `config.dist` asks for on `world_size` ranks.

    Raises UserError when the ranks do not divide into it, and says what would.
    """
    dist = config.dist
    if world_size % dist.tensor_parallel:
        fitting = [n for n in _divisors(world_size) if not config.model.undivided_by(n)]
        raise UserError(
            f"dist.tensor_parallel {dist.tensor_parallel} does not divide {world_size} ranks; take "
            f"{_either(fitting)}, or a multiple of {dist.tensor_parallel} ranks"
        )
    data = world_size // dist.tensor_parallel
    if dist.zero != 3 or dist.engine == "deepspeed":
        if data > 1 and dist.tensor_parallel > 1:
            raise UserError(
                f"dist.tensor_parallel {dist.tensor_parallel} on {world_size} ranks leaves {data} that read different "
                f"sequences, which needs dist.zero=3; set that, or start {dist.tensor_parallel} ranks"
            )
        return RankGrid(data, 1, dist.tensor_parallel)
    if data % dist.replicas:
        raise UserError(
            f"dist.replicas {dist.replicas} does not divide the {data} {_data_ranks(config)}; take "
            f"{_either(_divisors(data))}, or another number of ranks"
        )
    shard = data // dist.replicas
    if shard % dist.expert_parallel:
        experts = config.model.num_experts if isinstance(config.model, MoEConfig) else 1
        fitting = [n for n in _divisors(shard) if experts % n == 0]
        raise UserError(
            f"dist.expert_parallel {dist.expert_parallel} does not divide the {shard} {_data_ranks(config)} that a "
            f"copy of the model is cut over; take {_either(fitting)}, or another number of ranks"
        )
    return RankGrid(dist.replicas, shard, dist.tensor_parallel, dist.expert_parallel)


def micro_batch_size(config: TrainConfig, num_data_ranks: int) -> int:
    """Sequences per rank and forward pass. Raises UserError when the batch does not divide into them."""
    batch_size, micro = config.loop.batch_size, config.loop.micro_batch_size
    per_pass = num_data_ranks * (micro or 1)
    if batch_size % per_pass:
        near = max(batch_size // per_pass, 1) * per_pass
        # A smaller micro-batch trains the same.
        smaller = [n for n in _divisors(batch_size // num_data_ranks) if micro and n < micro]
        raise UserError(
            f"loop.batch_size {batch_size} is not divisible by {num_data_ranks} {_data_ranks(config)}"
            + (f" x loop.micro_batch_size {micro}" if micro else "")
            + f" = {per_pass}; take "
            + (f"loop.micro_batch_size={smaller[-1]}, or " if smaller and batch_size % num_data_ranks == 0 else "")
            + f"loop.batch_size={near}, or another number of ranks"
        )
    return micro or batch_size // num_data_ranks


def _data_ranks(config: TrainConfig) -> str:
    return "ranks" if config.dist.tensor_parallel == 1 else f"groups of {config.dist.tensor_parallel} ranks"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(numbers: list[int]) -> str:
    shown = [str(number) for number in numbers]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
