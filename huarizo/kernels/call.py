"""What the bindings share: a call to C is a struct of named fields, filled with sizes and addresses.

Each source has one struct, `Call`, and each binding its twin of the same name: a `ctypes.Structure` with the same
fields, whose size is compared with C's when the library is loaded (build.py). Of a tensor only the address goes to C,
and the address is given out here, for a tensor of the dtype, shape and layout that C reads.
"""

import ctypes

import torch

BAD_BOUNDARIES, NO_MEMORY = 1, 2  # what a kernel returns; vectors.h has the same


def address(wanted_by: str, tensor: torch.Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """Where the elements of a contiguous tensor begin, as long as the caller holds it; None for none.

    Raises:
        ValueError: it has another dtype or shape, or isn't contiguous.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{wanted_by} wants {dtype} {shape}, contiguous, not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.data_ptr()


def run(library: ctypes.CDLL | str, function: str, call: ctypes.Structure) -> None:
    """Call `huarizo_{function}` of a library that there is.

    Raises:
        MemoryError: there is no memory for what it needs beside its results.
        ValueError: the boundaries of the examples don't rise from 0 to the row's length.
    """
    status = getattr(library, f"huarizo_{function}")(ctypes.byref(call))
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for {function}")
    if status == BAD_BOUNDARIES:
        raise ValueError("cu_seqlens must rise from 0 to the row's length")
