"""Compiles the decoder layers, so that what stands between their matrix products runs as a few fused loops.

All layers of a model are alike, so one is compiled, with the number of tokens left open, and serves them all (regional
compilation). What was compiled is kept between runs. Where nothing can be compiled the layers run as they are, slower
and just as right, and the reason is told.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from huarizo import kernels
from huarizo.files import sha256_of
from huarizo.machine import keep_compiled_code
from huarizo.model import frozen
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.frozen.linear import TRACED_AS_ONE


def why_not(on: torch.device) -> str | None:
    """The reason why nothing can be compiled for this device, in words; None if it can."""
    if on.type not in ("cpu", "cuda"):
        return f"{on.type} is used uncompiled"
    keep_compiled_code()
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        torch.compile(_probe)(torch.ones(64, device=on))
    except Exception as error:  # whatever a missing compiler, header or backend sets off
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"the compiler does not work here ({lines[0] if lines else type(error).__name__})"
    finally:
        logger.setLevel(level)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compile_layers(model: Any) -> None:
    """Compile the decoder layers of a PeftModel in place, where `why_not` finds nothing against it."""
    base = model.get_base_model()
    keep_compiled_code()
    _let_products_be_cached()
    model.enable_input_require_grads()  # the first layer like all others: one compilation less
    for layer in base.get_submodule(architecture_of(base.config).layers):
        layer.compile(dynamic=True)


def _let_products_be_cached() -> None:
    """Tell torch's cache of compiled graphs that products traced as one do what the sources say and nothing else."""
    import torch._inductor.config as inductor

    sources = sorted(path for package in (frozen, kernels) for path in Path(package.__path__[0]).glob("*.py"))
    state = "".join(map(sha256_of, sources))
    for product in TRACED_AS_ONE:
        inductor.unsafe_marked_cacheable_functions[f"{product.__module__}.{product.__name__}"] = state


def seconds_compiling() -> float:
    """Seconds spent compiling in this process so far; loading what was kept counts too."""
    from torch._dynamo.utils import compilation_time_metrics

    return sum(compilation_time_metrics.get("_compile.compile_inner", []))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block layers run as they are: for what is short, or whose shapes would be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield
