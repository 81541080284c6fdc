"""What the options of the commands accept: each function parses one kind of value, or says why it cannot."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from muonlm_kernels.bench.measure import Shape

_MOST_ELEMENTS = 2**30


def shape_of(text: str) -> Shape:
    """The shape that an option names, as 1024x4096 or 12x768x768."""
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; MxN or KxMxN is one, as in 1024x4096 or 12x768x768")
    *stack, rows, cols = map(int, parts)
    shape = Shape(stack[0] if stack else None, rows, cols)
    if (shape.stack or 1) * rows * cols > _MOST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"{text} has more than {_MOST_ELEMENTS:,} elements")
    return shape


def device_of(text: str) -> torch.device:
    """The device that an option names; `auto` is a GPU where there is one."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this torch sees no GPU")
    return torch.device("cuda" if torch.cuda.is_available() and text != "cpu" else "cpu")


def writable_file(text: str) -> Path:
    """The path that an option names, checked before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: a file in an existing, writable folder is needed")
    return path


def threads_of(text: str) -> int:
    """A number of CPU threads. More than there are cores would only be slower; far too many end the process."""
    cores = os.cpu_count() or 1
    if not text.isdecimal() or not 0 < int(text) <= cores:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {cores}, the cores of this machine")
    return int(text)


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Parses a number above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
        return value

    return parse
