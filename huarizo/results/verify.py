"""A GGUF file is loaded in llama.cpp itself and compared with Transformers: token ids, and the next token's likelihood.

Generated texts are not compared: where two tokens are nearly as likely, a rounding decides. llama.cpp comes prebuilt
with the package xllamacpp (`pip install huarizo[verify]`), and is spoken with over 127.0.0.1.
"""

import dataclasses
import importlib
import json
import math
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from huarizo.data.prompts import OpenExchange
from huarizo.errors import ModelError, UserError
from huarizo.files import require_space
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import generating, open_assistant
from huarizo.model.merge import MergedWeights
from huarizo.results.chat_template import chat_template, leading_space, rendered
from huarizo.results.gguf import size_of, write_gguf

PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Translate 'good morning' into Korean.",
    "안녕하세요! 자기소개를 해 주세요.",
    "Write a haiku about llamas 🦙.",
    "Sort these numbers: 3, 1, 2.",
    "Explain what LoRA is in one sentence.",
)
ADAPTERS_BASE = "f16"  # type of the base that an adapter is tried on
TOP = 5  # likeliest tokens that are compared
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine itself
ROUNDING = {"f32": 0.01, "f16": 0.03, "bf16": 0.1, "q8_0": 0.3}
"""Nats: a larger mean difference is no rounding of a type, but another model. Measured: 0.0001, 0.003, 0.02, 0.1."""


@dataclass(frozen=True)
class Comparison:
    """Of a GGUF file with Transformers in fp32, over a number of prompts."""

    prompts: int
    compared: int
    """Prompts whose likelihoods could be compared: llama.cpp tells none of a token that is a part of a character."""
    other_tokens: list[str]
    """Prompts that llama.cpp cuts into other tokens."""
    largest_difference: float
    """Of a log-probability among the TOP likeliest tokens, in nats."""
    mean_difference: float
    same_likeliest: int
    """Of all prompts."""
    mean_difference_from_base: float
    """As `mean_difference`, from what the untuned model expects."""

    def agrees(self, kind: str) -> bool:
        """Whether it is the same model, but for the rounding of a type, and not the untuned one."""
        untuned = self.mean_difference > 2 * self.mean_difference_from_base
        return not self.other_tokens and self.compared > 0 and self.mean_difference < ROUNDING[kind] and not untuned

    def __str__(self) -> str:
        other = len(self.other_tokens)
        tokens = f"OTHER TOKEN IDS in {other} prompts" if other else "token ids identical"
        return (
            f"llama.cpp against Transformers, {self.prompts} prompts: {tokens}; likeliest next token the same in "
            f"{self.same_likeliest} of {self.prompts}, largest difference of a log-probability "
            f"{self.largest_difference:.4f}, mean {self.mean_difference:.4f}"
        )


def llama_cpp() -> Any:
    """The package that llama.cpp comes in.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("xllamacpp")
    except ImportError:
        raise UserError("--verify needs llama.cpp: pip install xllamacpp (or huarizo[verify])") from None


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, with the GGUF of an adapter if given, asked over a loopback address.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the file.
    """

    def __init__(self, file: Path, context: int = 2048, adapter: Path | None = None) -> None:
        xllamacpp = llama_cpp()
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.n_gpu_layers = context, 1, False, -1, 0
        params.cpuparams.n_threads = torch.get_num_threads()
        # llama.cpp's flash attention and 16-bit cache round by themselves, more than the file does
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"{file}: llama.cpp can't load this file: {error}") from None

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with DIRECTLY.open(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text in which special tokens are written out; `add_special`: with what begins every prompt."""
        return self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})["tokens"]

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the file's own chat template makes of messages (`role`, `content`)."""
        return self._post("/apply-template", {"messages": list(messages)})["prompt"]

    def likeliest(self, ids: Sequence[int], top: int = TOP) -> tuple[int, dict[int, float | None]]:
        """The likeliest next token, and the log-probabilities of the `top` likeliest.

        There are none where the token's bytes are only a part of a character: llama.cpp then waits for the rest of it.
        """
        options = {"n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False, "return_tokens": True}
        answer = self._post("/completion", {"prompt": list(ids), **options})
        found = answer.get("completion_probabilities") or [{"top_logprobs": []}]
        return answer["tokens"][0], {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]}

    def complete(self, ids: Sequence[int], n_predict: int = 80) -> dict[str, Any]:
        """A greedy answer; `content` is its text, `stop_type` is `eos` where it ended by itself."""
        return self._post("/completion", {"prompt": list(ids), "n_predict": n_predict, "temperature": 0.0})


def compare_with_transformers(tuned: Tuned, file: Path, adapter: Path | None = None) -> Comparison:
    """Load both and compare them on prompts in the run's format: how llama.cpp cuts them, and what it expects next.

    llama.cpp writes the prompts by the chat template in the file, where the format can be had as one.

    file: a GGUF of the tuned model; or of its base, with `adapter` on it.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the file.
    """
    other, encoder = LlamaCpp(file, adapter=adapter), tuned.encoder
    has_template = chat_template(encoder) is not None
    contexts, wrong = [], []
    for prompt in PROMPTS:
        contexts.append(encoder.encode_prompt("", [OpenExchange(prompt)]))
        if has_template:
            text = other.chat_prompt([{"role": "user", "content": prompt}])
            text = text.removeprefix(str(encoder.tokenizer.bos_token)) if encoder.adds_bos else text
        else:
            text = leading_space(encoder) + rendered(encoder, "", [OpenExchange(prompt)])
        if other.tokens(text, add_special=True) != contexts[-1]:
            wrong.append(prompt)
    return dataclasses.replace(compare_contexts(other, contexts, expectations(tuned, contexts)), other_tokens=wrong)


def compare_adapter(tuned: Tuned, adapter: Path, console: Console | None = None) -> Comparison:
    """As `compare_with_transformers`, for the GGUF of an adapter: on a GGUF (F16) of its base, which does not stay.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the files.
        MachineError: no space for the base beside the adapter.
    """
    weights = MergedWeights(tuned.base, None)
    require_space(adapter.parent, size_of(weights, ADAPTERS_BASE), "a GGUF of the base, to put the adapter on,")
    with tempfile.TemporaryDirectory(prefix=".", dir=adapter.parent) as folder:
        base = Path(folder) / "base.gguf"
        write_gguf(weights, tuned.encoder, base, ADAPTERS_BASE, adapter.stem, console)
        return compare_with_transformers(tuned, base, adapter)


def expectations(tuned: Tuned, contexts: Sequence[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What Transformers expects next after each list of token ids, in fp32: by the tuned model and by its base.

    Log-probabilities, float32 [vocabulary] each.
    """
    assistant = open_assistant(tuned, "fp32", torch.device("cpu"))

    def expected(ids: list[int]) -> torch.Tensor:
        with generating(assistant.model):
            return assistant.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).float()

    after = [expected(ids) for ids in contexts]
    with assistant.untuned():
        before = [expected(ids) for ids in contexts]
    return list(zip(after, before, strict=True))


def compare_contexts(
    other: LlamaCpp, contexts: Sequence[list[int]], expected: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Comparison:
    """Compare what llama.cpp expects next after each of these lists of token ids with `expectations` of the same."""
    differences: list[float] = []
    from_base: list[float] = []
    same = compared = 0
    for ids, (after, before) in zip(contexts, expected, strict=True):
        likeliest, found = other.likeliest(ids)
        differences += [_difference(value, after[number]) for number, value in found.items()]
        from_base += [_difference(value, before[number]) for number, value in found.items()]
        same += likeliest == int(after.argmax())
        compared += bool(found)
    largest = max(differences, default=0.0)
    return Comparison(len(contexts), compared, [], largest, _mean(differences), same, _mean(from_base))


def _difference(found: float | None, expected: torch.Tensor) -> float:
    """Infinite where one of the two is no number; llama.cpp then tells none."""
    difference = math.nan if found is None else abs(found - float(expected))
    return math.inf if math.isnan(difference) else difference


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
