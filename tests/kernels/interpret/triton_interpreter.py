"""Triton's interpreter made fit for tests: right bfloat16, and checks of every memory access.

The interpreter keeps bfloat16 as raw 16-bit patterns: it truncates on conversion, and adds, compares and multiplies the
patterns. `install` replaces these operations. `checks` records what sequential programs on one array cannot show by
their values: accesses outside of a tensor's elements (which are not carried out), elements that two programs write or
that one reads and another writes, addresses that one store names twice, and 32-bit integers that overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti
from triton.tools.tensor_descriptor import TensorDescriptor

_NOBODY, _SEVERAL = -1, -2


def to_float32(patterns: np.ndarray) -> np.ndarray:
    """Values of bfloat16 patterns (uint16)."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Patterns (uint16) of fp32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _value(handle: Any) -> np.ndarray:
    return to_float32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _handle(values: np.ndarray, dtype: Any) -> Any:
    data = to_bfloat16(values) if dtype == tl.bfloat16 else values.astype(ti._get_np_dtype(dtype))
    return ti.TensorHandle(data, dtype)


@dataclass
class Launch:
    """What one launch did: counts of elements for each kind of fault, and programs started."""

    kernel: str
    programs: int = 0
    out_of_bounds: int = 0
    write_write: int = 0
    read_write: int = 0
    duplicates: int = 0
    rewritten: int = 0
    overflows: int = 0
    memory: list[_Memory] = field(default_factory=list)

    def faults(self) -> list[str]:
        """The faults, named; empty where the launch was clean. A program may rewrite its own elements."""
        kinds = ("out_of_bounds", "write_write", "read_write", "duplicates", "overflows")
        return [f"{self.kernel}: {kind} {getattr(self, kind)}" for kind in kinds if getattr(self, kind)]


class _Memory:
    """The bytes from the first to the last element of overlapping tensors, and who touched each element."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.valid = np.zeros(stop - start, dtype=bool)
        self.writer = np.full(stop - start, _NOBODY)
        self.reader = np.full(stop - start, _NOBODY)

    def add(self, tensor: torch.Tensor) -> None:
        """Marks the first byte of each element of the view, so that padding between rows stays out of bounds."""
        size = tensor.element_size()
        offsets = np.zeros(1, dtype=np.int64)
        for length, stride in zip(tensor.shape, tensor.stride()):
            offsets = (offsets[:, None] + np.arange(length)[None, :] * stride * size).reshape(-1)
        self.valid[offsets + tensor.data_ptr() - self.start] = True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _memories(arguments: tuple[Any, ...]) -> list[_Memory]:
    tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
    merged: list[list[int]] = []
    for start, stop in sorted(map(_span, tensors)):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    memories = [_Memory(*bounds) for bounds in merged]
    for tensor in tensors:
        next(m for m in memories if m.start <= tensor.data_ptr() < m.stop).add(tensor)
    return memories


_current: Launch | None = None
_recording: list[Launch] | None = None


@contextmanager
def checks() -> Iterator[list[Launch]]:
    """Records the launches of the block."""
    global _recording
    _recording = []
    try:
        yield _recording
    finally:
        _recording = None


def _checked(builder: Any, pointers: np.ndarray, mask: np.ndarray, *, store: bool) -> np.ndarray:
    """The mask without the lanes that are out of bounds; notes what the others touch."""
    launch = _current
    if launch is None:
        return mask
    mask = np.broadcast_to(mask, pointers.shape).copy()
    x, y, z = builder.grid_idx
    program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
    good = np.zeros_like(mask)
    for memory in launch.memory:
        inside = mask & (pointers >= memory.start) & (pointers < memory.stop)
        at = (pointers[inside] - np.uint64(memory.start)).astype(np.int64)
        valid = memory.valid[at]
        good[inside] = valid
        at = at[valid]
        foreign_writer = (memory.writer[at] != _NOBODY) & (memory.writer[at] != program)
        if store:
            launch.duplicates += len(at) - len(np.unique(at))
            launch.rewritten += int((memory.writer[at] == program).sum())
            launch.write_write += int(foreign_writer.sum())
            launch.read_write += int(((memory.reader[at] != _NOBODY) & (memory.reader[at] != program)).sum())
            memory.writer[at] = program
        else:
            launch.read_write += int(foreign_writer.sum())
            alone = (memory.reader[at] == _NOBODY) | (memory.reader[at] == program)
            memory.reader[at] = np.where(alone, program, _SEVERAL)
    launch.out_of_bounds += int((mask & ~good).sum())
    return good


def _overflows(lhs: Any, rhs: Any, op: Any) -> int:
    if op not in (np.add, np.subtract, np.multiply) or lhs.data.dtype != np.int32 or rhs.data.dtype != np.int32:
        return 0
    wide = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
    return int((wide != wide.astype(np.int32)).sum())


def install() -> None:
    """Replaces the operations, once a process, before the first launch."""
    builder = ti.InterpreterBuilder
    binary_op, unary_op, dot = builder.binary_op, builder.unary_op, builder.create_dot
    cast, fp_to_fp, fma = builder.cast_impl, builder.create_fp_to_fp, builder.create_fma
    masked_load, masked_store, call = builder.create_masked_load, builder.create_masked_store, ti.GridExecutor.__call__
    device_call, patched = ti.InterpretedFunction.__call__, set[str]()

    def is_bfloat16(*types: Any) -> bool:
        return any(t.scalar == tl.bfloat16 for t in types)

    def new_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bfloat16(src.dtype, dst_type):
            return _handle(_value(src), dst_type.scalar)
        return cast(self, src, dst_type)

    def new_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bfloat16(src.dtype, dst_type):
            return _handle(_value(src), dst_type.scalar)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def new_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if _current is not None:
            _current.overflows += _overflows(lhs, rhs, op)
        if not is_bfloat16(lhs.dtype):
            return binary_op(self, lhs, rhs, op)
        values = op(_value(lhs), _value(rhs))
        return ti.TensorHandle(values, tl.bfloat16) if values.dtype == bool else _handle(values, tl.bfloat16)

    def new_unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _handle(op(_value(arg)), tl.bfloat16) if is_bfloat16(arg.dtype) else unary_op(self, arg, op)

    def new_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bfloat16(z.dtype):
            return fma(self, x, y, z)
        exact = _value(x).astype(np.float64) * _value(y) + _value(z)
        return _handle(exact.astype(np.float32), tl.bfloat16)

    def new_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if not is_bfloat16(a.dtype):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return _handle(np.matmul(_value(a), _value(b)) + _value(d), d.dtype.scalar)

    def new_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        keep = _checked(self, ptrs.data, np.asarray(getattr(mask, "data", mask)), store=False)
        return masked_load(self, ptrs, ti.TensorHandle(keep, tl.int1), *rest, **kwargs)

    def new_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        keep = _checked(self, ptrs.data, np.asarray(getattr(mask, "data", mask)), store=True)
        return masked_store(self, ptrs, value, ti.TensorHandle(keep, tl.int1), *rest, **kwargs)

    def new_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        # Infinity over infinity is an answer on a GPU, and not worth a warning here.
        with np.errstate(all="ignore"):
            if _recording is None:
                return call(self, *args, **kwargs)
            return checked_call(self, *args, **kwargs)

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        assert _recording is not None
        _current = Launch(self.fn.__name__, int(np.prod(self.grid)), memory=_memories((*args, *kwargs.values())))
        try:
            return call(self, *args, **kwargs)
        finally:
            _current.memory = []
            _recording.append(_current)
            _current = None

    def new_device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton patches its language anew at every call, which takes a quarter of all time; once a launch is enough.
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return device_call(self, *args, **kwargs)

    # `overflows` counts what this would check, at twice the cost of the operation.
    ti.interpreter_builder.options = replace(ti.interpreter_builder.options, sanitize_overflow=False)
    ti.InterpretedFunction.__call__ = new_device_call
    builder.cast_impl, builder.create_fp_to_fp, builder.create_fma = new_cast, new_fp_to_fp, new_fma
    builder.binary_op, builder.unary_op, builder.create_dot = new_binary_op, new_unary_op, new_dot
    builder.create_masked_load, builder.create_masked_store = new_load, new_store
    ti.GridExecutor.__call__ = new_call
