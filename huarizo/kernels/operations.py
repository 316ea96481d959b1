"""Registers functions with torch as operations, which its compiler calls by name without looking inside.

torch.library.custom_op does so too, but checks in Python at every call that no result shares memory with an argument.
That takes longer than all else around a call, so it is checked in the tests (torch.library.opcheck).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def operation(
    name: str, devices: str | Sequence[str] = "cpu"
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: makes a function the operation huarizo::{name}, which is returned.

    devices: the types of device on whose tensors it works; "default" is all. Another function does the same on another
    type of device under `torch.library.impl`.

    The function's annotations are the operation's schema. It changes none of its arguments, and returns new tensors.
    Their shapes are given to the compiler by a second function, under `torch.library.register_fake`.
    """
    qualified = f"huarizo::{name}"

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, devices, function)
        return getattr(torch.ops.huarizo, name).default

    return register
