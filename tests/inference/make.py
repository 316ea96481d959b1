"""Prompts, and errors of memory, that several tests of answers share."""

from typing import Any

NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
PROMPTS = ["Hi", "What is the capital of France, and why?", "Sing!", "One two three four five six seven", "?"]


def failing(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
