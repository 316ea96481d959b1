"""Runs tasks of EleutherAI's lm-evaluation-harness on the base and the tuned model.

Huarizo only passes the model: the harness (`pip install huarizo[harness]`) has the tasks, fetches their data from the
hub and computes the scores. It also interprets task names, groups and paths of task files.
"""

import importlib
from collections.abc import Callable, Sequence

from huarizo.errors import UserError
from huarizo.inference.generate import Assistant, generating

HarnessScores = dict[str, dict[str, dict[str, float]]]
"""{task: {metric: {"before": ..., "after": ...}}}."""


def run_harness(open_model: Callable[[], Assistant], tasks: Sequence[str], limit: int | None = None) -> HarnessScores:
    """Scores by task and metric, of the base and the tuned model.

    open_model: called once the harness is known to be installed.
    tasks: task names of the harness, or paths of task files. limit: most questions a task; None for all.

    Raises:
        UserError: no task, the harness is not installed, or a task is unknown or fails.
    """
    if not tasks:
        raise UserError("--harness needs the names of tasks, separated by commas: --harness arc_easy,hellaswag")
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        raise UserError("--harness needs lm-eval: pip install lm-eval (or huarizo[harness])") from None
    assistant = open_model()
    found: HarnessScores = {}
    for name in ("before", "after"):
        with assistant.untuned(name == "before"), generating(assistant.model):
            model = wrapper(pretrained=assistant.model, tokenizer=assistant.encoder.tokenizer, batch_size=4)
            try:
                results = evaluator.simple_evaluate(model, tasks=list(tasks), limit=limit, bootstrap_iters=1000)
            except Exception as error:  # a task, its data or the hub can raise anything
                raise UserError(f"lm-eval stopped at {', '.join(tasks)}: {error}") from error
        for task, scores in (results or {}).get("results", {}).items():
            for metric, value in scores.items():
                if isinstance(value, int | float):
                    found.setdefault(task, {}).setdefault(metric.removesuffix(",none"), {})[name] = value
    return found
