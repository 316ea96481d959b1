"""The tasks of EleutherAI's lm-evaluation-harness, asked of the base and of the tuned model.

Huarizo only hands the model over: the harness (`pip install huarizo[harness]`) brings the tasks, fetches their data
from the hub, and defines the scores. Names, paths to task files, and groups are its own.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from huarizo.errors import UserError
from huarizo.inference.generate import Assistant, generating


def run_harness(
    open_model: Callable[[], Assistant], tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores by task and metric: {task: {metric: {"before": ..., "after": ...}}}.

    open_model: is called when it is known that the harness is there.
    tasks: names that the harness knows, or paths of task files. limit: questions a task, None for all.

    Raises:
        UserError: no task, the harness is not installed, or it does not know or can't get a task.
    """
    if not tasks:
        raise UserError("--harness needs the names of tasks, with commas between: --harness arc_easy,hellaswag")
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        raise UserError("--harness needs lm-eval: pip install lm-eval (or huarizo[harness])") from None
    assistant, found = open_model(), {}
    for name in ("before", "after"):
        with assistant.untuned(name == "before"), generating(assistant.model):
            model = wrapper(pretrained=assistant.model, tokenizer=assistant.encoder.tokenizer, batch_size=4)
            try:
                results = evaluator.simple_evaluate(model, tasks=list(tasks), limit=limit, bootstrap_iters=1000)
            except Exception as error:  # whatever a task, its data or the hub sets off there
                raise UserError(f"lm-eval stopped at {', '.join(tasks)}: {error}") from error
        for task, scores in (results or {}).get("results", {}).items():
            for metric, value in scores.items():
                if isinstance(value, int | float):
                    found.setdefault(task, {}).setdefault(metric.removesuffix(",none"), {})[name] = value
    return found
