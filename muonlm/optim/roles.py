"""What each parameter is for: by the type of the module that holds it and its place, never by a piece of its name.

A module class can say it itself, for its own parameters and those of the modules below:

    class Router(nn.Module):
        parameter_roles: ClassVar[dict[str, Role]] = {"weight": "router", "projection.weight": "hidden"}

Of nested declarations the outermost counts. Hidden matrices are (out, in), expert stacks (E, out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from muonlm.config.errors import UserError
from muonlm.config.optim import ROLES, Role
from muonlm.optim.pieces import Split

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention

# Classes of transformers that its own names for such modules do not cover.
_ROUTERS = ("JetMoeTopKGating", "HunYuanMoEV1Gate")
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
# Base class of every adapter layer of peft: which of its matrices should move, and how, only the user knows.
_ADAPTERS = ("BaseTunerLayer",)


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter and what its place in the model says about it.

    Fields:
        names: its whole dotted names, that of `model.named_parameters()` first.
        shape, numel: as it is stored, over all ranks.
        role: None where nothing says.
        classes: names of the classes that the modules holding it are instances of.
        owner: where it stands and in what, for messages.
        split: the matrices that it consists of, where its type says so.
        is_transposed: a matrix is stored (in, out).
        is_main: follows `optim.lr`: a hidden matrix, an expert stack, or a convolution that mixes channels.
        obstacle: what it is, where that cannot be orthogonalized.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    role: Role | None
    classes: frozenset[str]
    owner: str
    split: Split | None = None
    is_transposed: bool = False
    is_main: bool = False
    obstacle: str | None = None

    @property
    def name(self) -> str:
        """The name in `model.named_parameters()`."""
        return self.names[0]


@dataclass(frozen=True)
class _Place:
    """What the modules around one say: `router_sizes` are the numbers of outputs that make a linear layer a router."""

    in_router: bool = False
    in_adapter: bool = False
    router_sizes: frozenset[int] = frozenset()


@dataclass
class _Found:
    """What was found about a parameter in one of the modules that hold it."""

    role: Role | None
    module: nn.Module
    path: str
    split: Split | None = None
    is_transposed: bool = False
    is_main: bool = False
    classes: set[str] = field(default_factory=set)


def describe_parameters(model: nn.Module) -> list[Parameter]:
    """All trainable parameters, in the order of `model.named_parameters()`; a tied one once, as embedding.

    Embeddings are `nn.Embedding` tables; the head is the module that `model.get_output_embeddings()` returns. Routers
    are modules of a class called ...Router and the linear layers in them, and linear layers beside an expert stack
    with one output, or one for each expert. Experts are the (E, out, in) parameters of a class called ...Experts, as in
    transformers. Convolutions are those of `torch.nn`. Every other `nn.Linear` weight is a hidden matrix, every other
    parameter of at most one dimension a bias or a norm's scale. Raises UserError for a declaration that does not fit.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    declared = _declared(model)
    found: dict[int, _Found] = {}
    for path, module, place in _walk(model, "", _Place()):
        for name, param in module.named_parameters(recurse=False):
            new = _find(module, name, param, head, place)
            new.path = f"{path}.{name}".lstrip(".")
            if id(param) in declared:
                new = _declare(new, declared[id(param)], param)
            new.classes = class_names(module)
            old = found.get(id(param))
            # A tied table is looked up and multiplied with; what it looks up decides.
            if old is not None and _rank(old.role) <= _rank(new.role):
                new, old = old, new
            found[id(param)] = new
            new.classes |= old.classes if old is not None else set()
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return [
        _parameter(param, tuple(names[id(param)]), found[id(param)])
        for param in model.parameters()
        if param.requires_grad
    ]


def class_names(module: nn.Module) -> set[str]:
    """Names of the classes that a module is an instance of: wrappers such as FSDP2's are classes of their own."""
    return {cls.__name__ for cls in type(module).__mro__ if cls is not object and cls is not nn.Module}


def _walk(module: nn.Module, path: str, place: _Place) -> Iterator[tuple[str, nn.Module, _Place]]:
    classes = class_names(module)
    place = replace(
        place,
        in_router=place.in_router or _is_router(classes),
        in_adapter=place.in_adapter or bool(classes & set(_ADAPTERS)),
    )
    yield path, module, place
    counts = [_num_experts(child) for child in module.children() if _is_experts(class_names(child))]
    sizes = frozenset({1, *counts}) if counts else frozenset()
    for name, child in module.named_children():
        # What an adapter wraps is no adapter.
        in_adapter = place.in_adapter and child is not getattr(module, "base_layer", None)
        yield from _walk(child, f"{path}.{name}".lstrip("."), replace(place, in_adapter=in_adapter, router_sizes=sizes))


def _is_router(classes: set[str]) -> bool:
    return any(name.endswith("Router") or name in _ROUTERS for name in classes)


def _is_experts(classes: set[str]) -> bool:
    return any(name.endswith("Experts") for name in classes)


def _num_experts(experts: nn.Module) -> int:
    stacks = [param.shape[0] for param in experts.parameters(recurse=False) if param.ndim == 3]
    return stacks[0] if stacks else len(list(experts.children()))


def _rank(role: Role | None) -> int:
    order = ("embedding", "head", None)
    return order.index(role) if role in order else len(order)


def _find(module: nn.Module, name: str, param: torch.Tensor, head: nn.Module | None, place: _Place) -> _Found:
    """The role of a parameter of `module`, from its type; `path` and `classes` are left for the caller."""
    found = _Found(None, module, "")
    is_weight = name == "weight"  # others are additions of a subclass that nothing is known about
    classes = class_names(module)
    if place.in_adapter:
        return found
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and is_weight:
        found.role = "embedding"
    elif isinstance(module, nn.Linear) and is_weight:
        is_router = place.in_router or module.out_features in place.router_sizes
        found.role = "head" if module is head else "router" if is_router else "hidden"
    elif isinstance(module, _CONVOLUTIONS) and is_weight:
        found.role = "convolution"
        found.is_main = module.groups == 1
    elif isinstance(module, _TRANSPOSED_CONVOLUTIONS) and is_weight:
        found.role, found.is_transposed = "convolution", True
    elif isinstance(module, nn.MultiheadAttention):
        found.role = "hidden" if name in _ATTENTION_WEIGHTS else "bias"
        if name == "in_proj_weight":
            found.split = Split((module.embed_dim,) * 3)
    elif _is_experts(classes) and param.ndim > 1:
        _find_experts(found, param)
    elif isinstance(module, _NORMS) or param.ndim <= 1:
        found.role = "bias" if name == "bias" else "norm"
    elif _is_router(classes) and is_weight and param.ndim == 2:
        found.role = "router"
    if found.role in ("hidden", "experts"):
        found.is_main = True
    return found


def _find_experts(found: _Found, param: torch.Tensor) -> None:
    """A parameter of an expert stack; transformers' classes say how they are stored (`use_experts_implementation`)."""
    module = found.module
    if param.ndim == 2 and getattr(module, "has_bias", False):
        found.role = "bias"
    if param.ndim != 3:
        return
    found.role = "experts"
    is_known = bool(class_names(module) & set(_TRANSPOSED_EXPERTS))
    found.is_transposed = bool(getattr(module, "is_transposed", is_known))
    is_fused = getattr(module, "has_gate", False) and param is getattr(module, "gate_up_proj", None)
    if is_fused and getattr(module, "is_concatenated", False):
        dim = 1 if found.is_transposed else 0
        half, odd = divmod(param.shape[1 + dim], 2)
        found.split = None if odd else Split((half, half), dim=dim)


def _declared(model: nn.Module) -> dict[int, Role]:
    """Roles that classes declare, by parameter; the outermost module is asked first."""
    roles: dict[int, Role] = {}
    for path, module in model.named_modules():
        for name, role in getattr(type(module), "parameter_roles", {}).items():
            where = f"{type(module).__name__}.parameter_roles"
            if role not in ROLES:
                raise UserError(f"{where}: unknown role {role!r} of {name!r}; roles are {', '.join(ROLES)}")
            below, _, last = name.rpartition(".")
            try:
                param = module.get_submodule(below)._parameters[last]
            except (AttributeError, KeyError):
                raise UserError(f"{where}: {name!r} is no parameter of {path or 'the model'}") from None
            if param is not None:  # a bias that was turned off
                roles.setdefault(id(param), role)
    return roles


def _declare(found: _Found, role: Role, param: torch.Tensor) -> _Found:
    dims = {"hidden": (2, 2), "experts": (3, 3), "convolution": (3, 5), "router": (2, 2)}.get(role, (0, 9))
    if not dims[0] <= param.ndim <= dims[1]:
        raise UserError(f"{found.path} {tuple(param.shape)} is declared as {role}, which has another number of dims")
    is_main = role in ("hidden", "experts") or (role == "convolution" and getattr(found.module, "groups", 1) == 1)
    return replace(found, role=role, is_main=is_main)


def _parameter(param: torch.Tensor, names: tuple[str, ...], found: _Found) -> Parameter:
    shape = tuple(param.shape)
    kind = type(found.module)
    return Parameter(
        names=names,
        shape=shape,
        numel=param.numel(),
        role=found.role,
        classes=frozenset(found.classes),
        owner=f"{found.path} {shape} in {kind.__module__}.{kind.__name__}",
        split=found.split,
        is_transposed=found.is_transposed,
        is_main=found.is_main,
        obstacle=_obstacle(param, found),
    )


def _obstacle(param: torch.Tensor, found: _Found) -> str | None:
    if param.ndim < 2:
        return "a vector" if param.ndim else "a number"
    if found.role == "convolution":
        return "the kernel of a transposed convolution" if found.is_transposed else None
    known = {"embedding": "an embedding table", "norm": "a norm's scale", "bias": "a stack of biases"}
    return known.get(found.role or "", None if param.ndim <= 3 else "neither a matrix nor a stack of matrices")
