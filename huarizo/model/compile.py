"""Compiles the decoder layers, so that the operations between their matrix products run as a few fused loops.

All layers of a model are alike, so one is compiled, for any number of tokens, and serves them all (regional
compilation). The compiled code is cached between runs. If nothing can be compiled, the layers run uncompiled: slower,
with the same results, and the run reports the reason.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from huarizo import kernels
from huarizo.files import sha256_of
from huarizo.machine import keep_compiled_code
from huarizo.model import frozen
from huarizo.model.architectures.structure import structure_of
from huarizo.model.frozen.linear import TRACED_AS_ONE

if TYPE_CHECKING:
    from peft import PeftModel


def why_not(on: torch.device) -> str | None:
    """The reason why nothing can be compiled for this device, as a message; None if it can."""
    if on.type not in ("cpu", "cuda"):
        return f"{on.type} is used uncompiled"
    keep_compiled_code()
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        torch.compile(_probe)(torch.ones(64, device=on))
    except Exception as error:  # anything that a missing compiler, header or backend causes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"the compiler does not work here ({lines[0] if lines else type(error).__name__})"
    finally:
        logger.setLevel(level)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compile_layers(model: "PeftModel") -> None:
    """Compile the decoder layers of a PeftModel in place. Call it only if `why_not` returns None."""
    base: Any = model.get_base_model()
    keep_compiled_code()
    _let_products_be_cached()
    model.enable_input_require_grads()  # makes the first layer like all others: one compilation fewer
    for layer in base.get_submodule(structure_of(base).layers).children():
        layer.compile(dynamic=True)


def _let_products_be_cached() -> None:
    """Let torch cache graphs with the products of TRACED_AS_ONE; the cache is keyed by the sources that define them."""
    import torch._inductor.config as inductor

    sources = sorted(path for package in (frozen, kernels) for path in Path(package.__path__[0]).glob("*.py"))
    state = "".join(map(sha256_of, sources))
    for product in TRACED_AS_ONE:
        inductor.unsafe_marked_cacheable_functions[f"{product.__module__}.{product.__name__}"] = state


def seconds_compiling() -> float:
    """Seconds spent compiling in this process so far, including loading from the cache."""
    from torch._dynamo.utils import compilation_time_metrics

    return sum(compilation_time_metrics.get("_compile.compile_inner", []))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block layers run uncompiled: for short work, or shapes that would trigger a new compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield
