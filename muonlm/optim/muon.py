"""Muon as a `torch.optim.Optimizer`: momentum, orthogonalization through the exchange, and AdamW for the rest.

Update of a hidden matrix W (out, in) with gradient G (K. Jordan, "Muon", 2024; scaling rules: `update_scale`):

    M <- mu M + (1 - mu) G          momentum ("ema"), or M <- mu M + G ("sum")
    U <- (1 - mu) G + mu M          Nesterov (with "sum": G + mu M), or U = M
    O <- newton_schulz(U)           nearest semi-orthogonal matrix, on the rank that the plan says
    W <- (1 - lr wd) W - lr scale O

Momentum and update are elementwise and happen where the parameter lies, sharded or not; only U travels, rounded to the
precision of the iterates, so that one process and many compute the same. Newton-Schulz does not see the scale of U:
"ema" and "sum" differ in nothing but the scale of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.optim.assign import SPLIT_MIN_FLOPS
from muonlm.optim.exchange import Blocks, Exchange
from muonlm.optim.gradients import Description, GradNorms, GroupShards, agree_and_clip, describe
from muonlm.optim.groups import check_group, check_numbers, check_options
from muonlm.optim.pieces import Piece, pieces_of
from muonlm.optim.plan import Plan, make_plan
from muonlm.optim.scaling import Scaling, update_scale
from muonlm.optim.shards import Shard, Sharding, tensor_shard
from muonlm.optim.shared import orthogonalize_part
from muonlm.optim.updates import adamw_step, advance_momentum, decay_and_add
from muonlm_kernels import COEFFICIENTS, coefficients, newton_schulz

__all__ = ["Muon", "Scaling", "update_scale"]


class Muon(torch.optim.Optimizer):
    """Muon on matrices; groups with `rule="adamw"` get AdamW in the same object and state_dict.

    `params` are parameters, named parameters or groups, as for any torch optimizer; group keys override the defaults
    (an AdamW group without `lr` and `weight_decay` of its own has Muon's). Parameters may be plain tensors, the same on
    every rank of the default process group, or DTensors sharded and replicated over any mesh of it, as FSDP2 and tensor
    parallelism make them; `sharding` is for engines that keep them otherwise. Every matrix is orthogonalized whole,
    once: the result is that of one process.

    Parameters of muon groups are matrices (out, in), stacks of experts (E, out, in), or, in a group with
    `convolution=True`, kernels (out, in, ...), else UserError. A group's `split` (`muonlm.optim.pieces.Split`) says
    that its weights consist of several matrices. `coefficients`, `steps`, `dtype` and `compensated` are those of
    `muonlm_kernels.newton_schulz` and hold for the whole optimizer.

    momentum_form: "ema" or "sum". momentum_dtype: of the state; None is that of the parameter. cautious: decay only
    the weights that the update moves towards zero (arXiv 2510.12402). grad_clip: largest norm of the gradients of the
    AdamW groups together; never changes a Muon step. non_finite: "raise" or "skip" when a gradient is not finite on
    any rank. bucket_bytes: what a rank assembles at a time; depth: how many such buckets are on their way while one is
    computed. split_min_flops: matrices with less work are never shared by several ranks.

    State is allocated at construction: `momentum_buffer` as the parameter is sharded for Muon; `exp_avg`,
    `exp_avg_sq`, `step` for AdamW. Gradients must be averaged over the ranks. A parameter without gradient on all
    ranks is left alone. Works with torch.amp.GradScaler.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scaling: Scaling = "rms_adamw",
        coefficients: str = "polar_express",
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
        compensated: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        momentum_form: Literal["ema", "sum"] = "ema",
        momentum_dtype: torch.dtype | None = None,
        cautious: bool = False,
        grad_clip: float = 0.0,
        non_finite: Literal["raise", "skip"] = "raise",
        bucket_bytes: int = 2**27,
        depth: int = 1,
        split_min_flops: int = SPLIT_MIN_FLOPS,
        sharding: Sharding | None = None,
    ) -> None:
        defaults = {
            "rule": "muon",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "scaling": scaling,
            "split": None,
            "convolution": False,
            "betas": betas,
            "eps": eps,
        }
        check_options(coefficients, steps, non_finite, grad_clip=grad_clip, bucket_bytes=bucket_bytes, depth=depth)
        self.grad_clip, self.non_finite = grad_clip, non_finite
        self.num_skipped = 0
        self._momentum_dtype, self._sharding = momentum_dtype, sharding
        self._dtype, self._steps = dtype, steps
        self._coefficients, self._compensated = coefficients, compensated
        # What needs more than the rounded update travels and is rounded unrounded: fp32.
        self._wire_dtype = torch.float32 if compensated or dtype == torch.float16 else dtype
        can_share = not compensated and COEFFICIENTS[coefficients].preconditioner != "aol"
        self._plan_options = {
            "bucket_bytes": bucket_bytes,
            "steps": steps,
            "split_min_flops": split_min_flops if can_share else 2**63,
            "element_bytes": self._wire_dtype.itemsize,
        }
        self._depth = depth
        self._shards: dict[torch.Tensor, Shard] = {}
        self._plan: Plan | None = None
        self._exchange: Exchange | None = None
        # What all ranks must have alike, beside the options of the groups.
        self._options = {
            "coefficients": coefficients,
            "dtype": dtype,
            "compensated": compensated,
            "momentum_dtype": momentum_dtype,
            "non_finite": non_finite,
            "depth": depth,
            **self._plan_options,
        }
        self._group_keys = tuple(defaults)
        self._parameter_lines: list[str] | None = None
        self._norms: GradNorms | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate its state; the work is assigned anew at the next step. All ranks must add it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = check_group(group, len(self.param_groups) - 1)
            *others, own = (str(g.get("name", number)) for number, g in enumerate(self.param_groups))
            if own in others:
                raise UserError(f"two parameter groups are named {own!r}; norms are told apart by the name")
            shards = [self._make_shard(name, param, group) for name, param in zip(names, group["params"], strict=True)]
            for shard in shards if group["rule"] == "muon" else []:
                pieces_of(0, shard.name, shard.layout.shape, group["split"])
        except UserError:
            del self.param_groups[-1]
            raise
        for param, shard in zip(group["params"], shards, strict=True):
            self._shards[param] = shard
            values = shard.state_like()
            state = self.state[param]
            if group["rule"] == "muon":
                state["momentum_buffer"] = torch.zeros_like(values, dtype=self._momentum_dtype)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
                state["exp_avg"] = torch.zeros_like(values)
                state["exp_avg_sq"] = torch.zeros_like(values)
        self._plan = self._exchange = self._parameter_lines = None

    def _make_shard(self, name: str, param: torch.Tensor, group: dict[str, Any]) -> Shard:
        is_stack = param.ndim == 3 and not group["convolution"]
        if self._sharding is not None:
            return self._sharding.shard(name, param)
        return tensor_shard(name, param, is_stack=is_stack)

    def shards(self, group: dict[str, Any]) -> list[Shard]:
        """What this process holds of each parameter of a group."""
        return [self._shards[param] for param in group["params"]]

    def plan(self) -> Plan:
        """Who orthogonalizes what, when; made once for the groups there are. The same on all ranks, without traffic."""
        if self._plan is not None:
            return self._plan
        shards = [shard for group in self._muon_groups() for shard in self.shards(group)]
        splits = [group["split"] for group in self._muon_groups() for _ in group["params"]]
        pieces: list[Piece] = []
        for index, (shard, split) in enumerate(zip(shards, splits, strict=True)):
            pieces += pieces_of(index, shard.name, shard.layout.shape, split)
        pinned = frozenset(index for index, shard in enumerate(shards) if shard.pinned)
        layouts = [shard.layout for shard in shards]
        self._plan = make_plan(pieces, layouts, collectives.world_size(), pinned=pinned, **self._plan_options)
        return self._plan

    @torch.no_grad()
    def clip_gradients(self, max_norm: float = 0.0) -> GradNorms:
        """Make sure that all ranks can take the next step, measure gradient norms, and clip those of AdamW groups.

        See `muonlm.optim.gradients.agree_and_clip`; `step` does it with `grad_clip` when it was not called before.
        """
        check_numbers(max_norm=max_norm)
        self._norms = None
        if self._sharding is not None:
            self._sharding.before_step()
        groups = [
            GroupShards(str(group.get("name", number)), group["rule"] == "adamw", self.shards(group))
            for number, group in enumerate(self.param_groups)
        ]
        overflow = self._undo_loss_scale()
        self._norms = agree_and_clip(
            groups,
            self._describe(max_norm),
            max_norm=max_norm,
            device=self._device,
            skip_non_finite=self.non_finite == "skip" or getattr(self, "found_inf", None) is not None,
            overflow=overflow,
        )
        return self._norms

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter. Collectives: those of `clip_gradients`, then those of `Exchange.run`.

        Raises what `clip_gradients` raises, before anything has changed, and RuntimeError when another number of
        matrices was orthogonalized than the plan says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms, self._norms = self._norms, None
        if norms is not None and getattr(self, "grad_scale", None) is not None:
            raise UserError(
                "the gradients were measured and clipped while they carried the loss scale; call "
                "scaler.unscale_(optimizer) before clip_gradients. Nothing was updated"
            )
        norms = norms or self.clip_gradients(self.grad_clip)
        self._norms = None
        if norms.is_skipped:
            self.num_skipped += 1
            if self._sharding is not None:
                self._sharding.zero_grad()
            return loss
        self._muon_step()
        for group in self.param_groups:
            if group["rule"] == "adamw":
                adamw_step(group, self.shards(group), self._states(group))
        if self._sharding is not None:
            self._sharding.after_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As in torch; state that lies on its owners (`sharding`) is this rank's part, and marked as such."""
        part = {} if self._sharding is None else {"part": self._part}
        return {**super().state_dict(), **part}

    @property
    def _part(self) -> str:
        """Which part of the state lies here."""
        return f"rank {collectives.rank()}: {describe(self._lines(), []).number}"

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but momentum keeps its own dtype rather than that of the parameter.

        Raises UserError for the part of another rank or layout: `muonlm.optim.state.named_state` restores anywhere.
        """
        if state_dict.get("part") != (None if self._sharding is None else self._part):
            raise UserError(
                f"this state is not what rank {collectives.rank()} keeps of this optimizer: each rank has its own part."
                " Save and load muonlm.optim.state.named_state(optimizer) through torch.distributed.checkpoint"
            )
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, self._shards, strict=True):
            loaded, state = state_dict["state"].get(number, {}), self.state[param]
            if self._momentum_dtype is not None and "momentum_buffer" in loaded:
                # Not from what torch has cast: that has lost the bits that the parameter's dtype does not have.
                state["momentum_buffer"] = loaded["momentum_buffer"].to(param.device, self._momentum_dtype)
            if "step" in state:
                state["step"] = state["step"].to(param.device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what `clip_gradients` found out about the old gradients is forgotten."""
        self._norms = None
        super().zero_grad(set_to_none)
        if self._sharding is not None:
            self._sharding.zero_grad(set_to_none)

    @property
    def _device(self) -> torch.device:
        return next((shard.local().device for shard in self._shards.values()), torch.device("cpu"))

    def _muon_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["rule"] == "muon"]

    def _lines(self) -> list[str]:
        return [
            f"{shard.name} under {group['rule']}, {shard.layout.key}, split {group['split']}"
            for group in self.param_groups
            for shard in self.shards(group)
        ]

    def _describe(self, max_norm: float) -> Description:
        if self._parameter_lines is None:
            self._parameter_lines = self._lines()
        options = [f"{key} {value}" for key, value in {"grad_clip": max_norm, **self._options}.items()]
        for number, group in enumerate(self.param_groups):
            values = {key: group.get(key) for key in self._group_keys} | {"lr": float(group["lr"])}
            options += [f"{key} {value} in group {group.get('name', number)}" for key, value in values.items()]
        return describe(self._parameter_lines, options)

    def _undo_loss_scale(self) -> bool:
        """Divide the gradients by the scale that a GradScaler has set here; whether it found them not finite."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            grads = [g for shard in self._shards.values() if (g := shard.grad()) is not None]
            if grads:
                torch._foreach_div_(grads, float(scale))
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _muon_step(self) -> None:
        """All Muon groups share one exchange, so that the work is balanced over everything there is."""
        groups = self._muon_groups()
        if not groups:
            return
        if self._exchange is None:
            self._exchange = Exchange(self.plan(), collectives.rank(), self._depth)
        updates = self._exchange.new_updates(self._wire_dtype, self._device)
        remaining = iter(updates.by_param)
        for group in groups:
            own = list(islice(remaining, len(group["params"])))
            advance_momentum(group, self.shards(group), self._states(group), own)
        computed = self._exchange.run(updates, self._orthogonalize, self._orthogonalize_part)
        planned = self._exchange.num_tasks
        if computed != planned:
            raise RuntimeError(f"{computed} matrices were orthogonalized on this rank, the plan has {planned}")
        blocks = zip(updates.by_param, self._exchange.blocks, strict=True)
        for group in groups:
            self._apply(group, islice(blocks, len(group["params"])))

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.state[param] for param in group["params"]]

    def _orthogonalize(self, stack_KMN: torch.Tensor) -> torch.Tensor:
        return newton_schulz(
            stack_KMN,
            coefficients=self._coefficients,
            steps=self._steps,
            dtype=self._dtype,
            compensated=self._compensated,
        )

    def _orthogonalize_part(self, part_MN: torch.Tensor, team: collectives.Group) -> torch.Tensor:
        reduce = partial(collectives.all_reduce, group=team, kind="shared_all_reduce")
        return orthogonalize_part(
            part_MN,
            coefficients(self._coefficients, self._steps),
            self._dtype,
            partial(reduce, op="sum"),
            partial(reduce, op="max"),
        )

    def _apply(self, group: dict[str, Any], updates: Iterable[tuple[torch.Tensor, Blocks]]) -> None:
        """Move the parameters of a group that have a gradient by their updates.

        Matrices of several shapes in one parameter are multiplied by the factors on them one by one.
        """
        weights, orthogonal, factors = [], [], []
        for shard, (update, blocks) in zip(self.shards(group), updates, strict=True):
            local = shard.local()
            if shard.grad() is None or not local.numel():
                continue
            scales = {shape: update_scale(group["scaling"], *shape) for shape in blocks}
            if len(set(scales.values())) == 1:
                weights.append(local)
                orthogonal.append(update.view(local.shape))
                factors.append(scales.popitem()[1])
                continue
            update = update.to(torch.promote_types(update.dtype, torch.float32))
            for shape, segments in blocks.items():
                torch._foreach_mul_([segment.view_of(update) for segment in segments], scales[shape])
            decay_and_add(group, [local], [update.view(local.shape)], [1.0])
        decay_and_add(group, weights, orthogonal, factors)
