"""Shared by the bindings: a call to C passes one struct of named fields with sizes and addresses.

Each C source defines a struct `Call`, and each binding a `ctypes.Structure` of the same name and fields, whose size is
compared with C's when the library is loaded (build.py). Only addresses of tensors are passed to C; `address` checks
dtype, shape and layout first.
"""

import ctypes

import torch

from huarizo.kernels.build import Library

BAD_BOUNDARIES, NO_MEMORY = 1, 2  # return values of a kernel, as in vectors.h


def address(wanted_by: str, tensor: torch.Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The address of a contiguous tensor's elements, valid while the caller holds the tensor; None for None.

    Raises:
        ValueError: the tensor has another dtype or shape, or isn't contiguous.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{wanted_by} wants {dtype} {shape}, contiguous, not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.data_ptr()


def run(library: Library | str, function: str, call: ctypes.Structure) -> None:
    """Call `huarizo_{function}` of a loaded library.

    Raises:
        RuntimeError: the library isn't there.
        MemoryError: there is no memory for its workspace.
        ValueError: the boundaries of the examples don't rise from 0 to the row's length.
    """
    if isinstance(library, str):
        raise RuntimeError(f"no kernel: {library}")
    status = getattr(library.functions, f"huarizo_{function}")(ctypes.byref(call))
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for {function}")
    if status == BAD_BOUNDARIES:
        raise ValueError("cu_seqlens must rise from 0 to the row's length")
