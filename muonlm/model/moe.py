"""Mixtures of experts without dropped tokens: the router, the experts, and what keeps their loads even.

Parameter names and mathematics are those of transformers' Glm4MoeForCausalLM (router "sigmoid") and Qwen3MoeForCausalLM
("softmax"), with each kind of expert matrix as one stack (E, out, in). Where `group` is set, its ranks hold other
experts, and tokens travel to them and back (`muonlm.model.tokens`). Shape suffixes: N tokens, K experts of each, S = N
* K rows, D hidden, F width of an expert, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import MoEConfig
from muonlm.dist import collectives
from muonlm.dist.collectives import Group
from muonlm.model import tokens
from muonlm.model.experts import Experts as Implementation
from muonlm.model.experts import experts_grouped, experts_loop, experts_reference
from muonlm.model.layers import Linear, upcast
from muonlm.model.mlp import MLP
from muonlm.model.regions import enter, leave, local, scale_gradient

_IMPLEMENTATIONS: dict[str, Implementation] = {
    "grouped": experts_grouped,
    "loop": experts_loop,
    "reference": experts_reference,
}


class Routing(NamedTuple):
    """Where tokens go, with the rows of each expert; `aux` is the auxiliary loss, if there is one, 1 for even loads."""

    weights_NK: Tensor
    experts_NK: Tensor
    counts_E: Tensor
    aux: Tensor | None


class TopKRouter(Linear):
    """Scores every expert for every token, in fp32, and picks the best.

    While training it counts, over the passes since `take_load`, the rows of each expert and the entropy of the scores.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.config = config
        # Under this name in transformers; it enters the choice and not the weights, and has no gradient.
        bias = torch.zeros(config.num_experts) if config.router == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self._load: Tensor | None = None

    def forward(self, x_ND: Tensor) -> Routing:  # type: ignore[override]
        """Routing of rows (N, D)."""
        config = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(upcast(x_ND), upcast(local(self.weight)))
            scores_NE = logits_NE.sigmoid() if config.router == "sigmoid" else logits_NE.softmax(-1)
            bias = self.e_score_correction_bias
            choice_NE = scores_NE.detach() if bias is None else scores_NE.detach() + bias
            experts_NK = choice_NE.topk(config.experts_per_token, sorted=False).indices
            weights_NK = scores_NE.gather(1, experts_NK)
            if config.normalize_weights:
                weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
            weights_NK = weights_NK * config.routed_scale
            counts_E, aux = count_experts(experts_NK, config.num_experts), None
            if self.training and torch.is_grad_enabled():
                shares_NE = scores_NE if config.router == "softmax" else scores_NE / scores_NE.sum(-1, keepdim=True)
                self._count(counts_E, shares_NE.detach())
                if config.balance == "loss":
                    aux = auxiliary_loss(counts_E, shares_NE)
        return Routing(weights_NK, experts_NK, counts_E, aux)

    @torch.no_grad()
    def _count(self, counts_E: Tensor, shares_NE: Tensor) -> None:
        entropy = torch.special.entr(shares_NE).sum(-1).mean()
        routed = torch.full_like(entropy, shares_NE.size(0) * self.config.experts_per_token)
        load = torch.cat((counts_E, torch.stack((routed, entropy, torch.ones_like(entropy))))).double()
        self._load = load if self._load is None else self._load + load

    def take_load(self) -> Tensor:
        """(E + 3,) fp64: rows of each expert, rows that were to be routed, the sum over passes of the mean entropy in
        nats, and passes. Counts anew from here."""
        load, self._load = self._load, None
        if load is None:
            return torch.zeros(self.config.num_experts + 3, dtype=torch.float64, device=local(self.weight).device)
        return load


def count_experts(experts_NK: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, (E,) int64."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts_NK.device)
    rows = experts_NK.flatten()
    return counts.scatter_add_(0, rows, torch.ones_like(rows))


def auxiliary_loss(counts_E: Tensor, shares_NE: Tensor) -> Tensor:
    """E * sum over experts of (share of the rows) * (mean score), 1 where either is even (arXiv:2101.03961, eq. 4).

    `shares_NE` are scores that sum to 1 over the experts; only they have a gradient.
    """
    fraction_E = counts_E.to(shares_NE.dtype) / counts_E.sum()
    return counts_E.numel() * (fraction_E * shares_NE.mean(0)).sum()


class RoutedExperts(nn.Module):
    """Stacks of the experts' matrices; `group` has the ranks that hold others, None where all are here."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.group: Group = None
        E, F_, D = config.num_experts, config.expert_size, config.hidden_size
        if config.gated:
            self.gate_proj = nn.Parameter(torch.empty(E, F_, D))
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, counts_E: Tensor) -> Tensor:
        """The weighted sum of each token's experts, (N, D) in the compute dtype; `counts_E` are rows of each expert."""
        num_copies = experts_NK.size(1)
        order = tokens.order_by(experts_NK.flatten())
        x_SD = tokens.repeat_rows(x_ND, order, num_copies)
        scale_S = tokens.reorder(weights_NK.flatten(), order)
        run = self._compute if self.group is None else self._compute_elsewhere
        return tokens.sum_rows(run(x_SD, scale_S, counts_E), order, num_copies)

    def _compute(self, x_SD: Tensor, scale_S: Tensor, counts_E: Tensor) -> Tensor:
        weights = [local(weight) for weight in self.parameters(recurse=False)]
        if self.group is not None:
            # They meet the tokens of all its ranks, and are averaged over the ranks that hold the same experts alone.
            weights = [scale_gradient(weight, 1 / dist.get_world_size(self.group)) for weight in weights]
        return self._implementation(x_SD)(x_SD, scale_S, counts_E, weights, self.config.activation)

    def _compute_elsewhere(self, x_SD: Tensor, scale_S: Tensor, counts_E: Tensor) -> Tensor:
        """On the ranks that hold the experts. Rows arrive by rank, and are sorted by expert there."""
        counts_RE, traffic = tokens.exchange_counts(counts_E, self.group)
        x_SD, scale_S = tokens.send_rows(x_SD, traffic), tokens.send_rows(scale_S, traffic)
        num_ranks, num_local = counts_RE.shape
        experts = torch.arange(num_local, device=x_SD.device).repeat(num_ranks)
        order = tokens.order_by(experts.repeat_interleave(counts_RE.flatten(), output_size=x_SD.size(0)))
        y_SD = self._compute(tokens.reorder(x_SD, order), tokens.reorder(scale_S, order), counts_RE.sum(0))
        return tokens.return_rows(tokens.sum_rows(y_SD, order, 1), traffic)

    def _implementation(self, x_SD: Tensor) -> Implementation:
        kind = self.config.experts
        if self.config.attention == "math":
            kind = "reference"  # the others cannot be differentiated twice
        elif kind == "auto":
            # Grouped products take 16 bits, and rows of whole 16 bytes.
            fits = all(size % 8 == 0 for size in local(self.down_proj).shape[1:])
            kind = "grouped" if fits and x_SD.is_cuda and torch.is_autocast_enabled("cuda") else "loop"
        return _IMPLEMENTATIONS[kind]


class MoE(nn.Module):
    """Feed-forward layer of routed and shared experts; the ranks of `group` have the other columns of each."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.group: Group = None
        self.keep_products = False
        self.gate = TopKRouter(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = MLP(config, config.shared_size) if config.num_shared_experts else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the auxiliary loss where one is asked for."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        # Each rank of `group` has a part of the gradient of the weights, as it has of that of the tokens.
        weights = enter(routing.weights_NK, self.group)
        out = self.experts(enter(x_ND, self.group), weights, routing.experts_NK, routing.counts_E)
        out = leave(out, self.group, keep=self.keep_products).view_as(x_BTD)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_BTD)
        return out, routing.aux


class Balance(NamedTuple):
    """How evenly the experts were used in a step.

    max_load: rows of the busiest expert of any layer over the mean of its layer. router_entropy: mean over tokens and
    layers, in nats. dropped_rows: rows that no expert got; 0, since nothing bounds how many one takes.
    """

    max_load: float
    router_entropy: float
    dropped_rows: float


def forget_loads(model: nn.Module) -> None:
    """Leave out of the next `settle_loads` what passes have counted so far."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.take_load()


def settle_loads(model: nn.Module, *, measure: bool) -> Balance | None:
    """After an optimizer step: move the bias of each expert toward an even load, and measure how even it was.

    The bias of experts with more than the mean number of rows sinks by `bias_rate`, that of the others rises
    (arXiv:2408.15664). One all_reduce of E + 3 fp64 numbers a layer with experts. None for a model without experts, and
    where nothing is to be measured: then the host does not wait.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if not routers:
        return None
    # Ranks that share the columns of a layer count the same rows, and so do passes that are recomputed: all as often.
    loads = collectives.all_reduce(torch.stack([router.take_load() for router in routers]))
    rows_LE, (routed_L, entropy_L, passes_L) = loads[:, :-3], loads[:, -3:].unbind(1)
    mean_L1 = rows_LE.mean(-1, keepdim=True)
    for router, rows_E, mean in zip(routers, rows_LE, mean_L1):
        if router.config.balance == "bias":
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.add_(torch.sign(mean - rows_E).float(), alpha=router.config.bias_rate)
    if not measure:
        return None
    max_load = (rows_LE / mean_L1.clamp_min(1)).max()
    entropy = (entropy_L / passes_L.clamp_min(1)).mean()
    dropped = (routed_L - rows_LE.sum(-1)).sum()
    return Balance(*torch.stack((max_load, entropy, dropped)).tolist())
