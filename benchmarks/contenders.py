"""One training run of one contender, in a process of its own, so that its seconds and its peak memory are its own.

    python benchmarks/contenders.py NAME CONFIG.json RESULT.json

In goes a `Task`; out come, for every optimizer step, its seconds and its tokens without padding, the seconds of the
whole training loop and the peak memory. Each contender is the run that its user would start: the Trainer's, TRL's or
Huarizo's own, with one callback that looks at the clock. A step lasts from the end of the one before to its own end, so
that fetching rows, logging and all else between steps counts.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

ROWS_A_STEP = 4
MAX_LENGTH = 512
SEED = 42
LEARNING_RATE = 2e-4
RANK, ALPHA, DROPOUT, TARGETS = 8, 16, 0.05, ["q_proj", "v_proj"]
# Tried with TRL 1.16 in bf16 on 2 cores of an EPYC with AVX512-BF16, SmolLM2-135M, 6 timed steps a run, on a
# busy machine. Median tokens/s: padded to the longest of 4 rows 205 (loss of all tokens: 186; under autocast: 159),
# packing bfd into 512 tokens 291, 186 and 286 (2 packs a step: 253), into 1024 tokens 246 (loss of all tokens: 238),
# padding-free 268, 297 and 307. Packing "wrapped" is left out, for rows would see each other.
TRL_ON_CPU = {
    "padding_free": True, "max_length": None, "gradient_checkpointing": False, "bf16": False,
    "include_num_input_tokens_seen": "all",
}  # fmt: skip
# On a card without FlashAttention's own package, padding-free rows cost a mask of the whole row.
TRL_ON_CARD = {"padding_free": False, "max_length": MAX_LENGTH, "gradient_checkpointing": False, "bf16": True}


@dataclass(frozen=True)
class Task:
    """What every contender trains: the model's folder, a JSON file of Alpaca rows, and how many optimizer steps.

    rows_a_step is the batch size. trl_path is a folder that holds TRL where the environment does not; trl_settings go
    over those of `trl`.
    """

    model: str
    rows: str
    steps: int
    rows_a_step: int = ROWS_A_STEP
    trl_path: str | None = None
    trl_settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Clock(TrainerCallback):
    """When each optimizer step ended, and how many tokens had been seen by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.seen = [0]
        self.cpu: list[float] = []
        self.train_seconds = 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(self._now())
        self.cpu.append(time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(self._now())
        self.cpu.append(time.process_time())
        self.seen.append(state.num_input_tokens_seen)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_seconds = self._now() - self.ends[0]

    def result(self) -> dict[str, Any]:
        return {
            "step_seconds": [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)],
            "step_tokens": [after - before for before, after in zip(self.seen, self.seen[1:], strict=False)],
            "step_cpu_seconds": [end - begin for begin, end in zip(self.cpu, self.cpu[1:], strict=False)],
            "train_seconds": self.train_seconds,
        }


def prompt_of(row: dict[str, str]) -> str:
    """The tutorial's prompt."""
    middle = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"


def read_task_rows(task: Task) -> list[dict[str, str]]:
    return json.loads(Path(task.rows).read_text(encoding="utf-8"))


def stock_arguments(task: Task, out: str) -> dict[str, Any]:
    """TrainingArguments alike for every Trainer but Huarizo's, which takes them from its recipe."""
    return {
        "output_dir": out, "per_device_train_batch_size": task.rows_a_step, "max_steps": task.steps, "seed": SEED,
        "learning_rate": LEARNING_RATE, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "include_num_input_tokens_seen": "non_padding",
    }  # fmt: skip


def stock_model(task: Task, dtype: torch.dtype) -> Any:
    """Transformers' model with PEFT's LoRA, as they come."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def stock_tokenizer(task: Task) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stock(task: Task, out: str, clock: Clock, dtype: torch.dtype, padding: bool | str) -> None:
    """The Trainer with every token but padding as a label; `padding` is the tokenizer's, where rows are tokenised."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = stock_tokenizer(task)

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH, padding=padding)

    texts = Dataset.from_dict({"text": [prompt_of(row) + row["output"] for row in read_task_rows(task)]})
    trainer = Trainer(
        model=stock_model(task, dtype),
        args=TrainingArguments(**stock_arguments(task, out), fp16=dtype == torch.float16),
        train_dataset=texts.map(encode, batched=True, remove_columns=["text"]),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(out)


def tutorial(task: Task, out: str, clock: Clock) -> None:
    """The tutorial: padded to 512; fp32 on a CPU, and its own fp16 on a card."""
    stock(task, out, clock, torch.float16 if torch.cuda.is_available() else torch.float32, "max_length")


def fastest_float() -> torch.dtype:
    """The float format that a user of stock tools would take here: bf16 where the hardware has it, else fp32."""
    from huarizo.machine import DTYPES, device, float_precision

    return DTYPES[float_precision(device())]


def trainer(task: Task, out: str, clock: Clock) -> None:
    """The same Trainer at its best: in the fastest float format, padded to the longest row of a batch."""
    stock(task, out, clock, fastest_float(), False)


def trl_rows(task: Task, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows tokenised and cut beforehand, as TRL wants them for padding-free batches; the response is learnt."""
    rows = []
    for row in read_task_rows(task):
        prompt = tokenizer(prompt_of(row))["input_ids"]
        whole = [*tokenizer(prompt_of(row) + row["output"])["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        rows.append({"input_ids": whole[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]})
    return rows


def trl_settings(task: Task) -> dict[str, Any]:
    """The fastest that was found for this device, and what the task puts over it."""
    return (TRL_ON_CARD if torch.cuda.is_available() else TRL_ON_CPU) | task.trl_settings


def trl(task: Task, out: str, clock: Clock, **more: Any) -> None:
    """TRL's SFTTrainer at the fastest setting that was found for it."""
    sys.path += [task.trl_path] if task.trl_path else []
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    tokenizer = stock_tokenizer(task)
    trainer = SFTTrainer(
        model=stock_model(task, fastest_float()),
        args=SFTConfig(**(stock_arguments(task, out) | trl_settings(task) | more)),
        train_dataset=Dataset.from_list(trl_rows(task, tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(out)


def trl_liger(task: Task, out: str, clock: Clock) -> None:
    """TRL with Liger's kernels."""
    trl(task, out, clock, use_liger_kernel=True)


def unsloth(task: Task, out: str, clock: Clock) -> None:
    """Unsloth's patched model in 16 bits, in TRL's SFTTrainer."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]  # isort: skip  # patches the others
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    model, _ = FastLanguageModel.from_pretrained(
        task.model, max_seq_length=MAX_LENGTH, dtype=fastest_float(), load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS, bias="none", random_state=SEED,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = stock_tokenizer(task)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**(stock_arguments(task, out) | trl_settings(task))),
        train_dataset=Dataset.from_list(trl_rows(task, tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(out)


def huarizo(precision: str) -> Callable[[Task, str, Clock], None]:
    """Huarizo in one precision. Its clock comes in as a tracker, which a recipe names in `trainer.report_to`."""

    def run(task: Task, out: str, clock: Clock) -> None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        from huarizo.recipe import make_recipe
        from huarizo.training.finetune import fine_tune

        INTEGRATION_TO_CALLBACK["benchmark"] = clock  # pyright: ignore[reportArgumentType]
        recipe = make_recipe(
            model=task.model,
            data={"train": task.rows, "eval": 0, "prompt": "alpaca", "max_length": MAX_LENGTH},
            lora={"r": RANK, "alpha": ALPHA, "dropout": DROPOUT, "target_modules": TARGETS},
            training={
                "max_steps": task.steps, "batch_size": task.rows_a_step, "learning_rate": LEARNING_RATE, "seed": SEED
            },
            precision=precision, samples=0, output=out, trainer={"report_to": "benchmark"},
        )  # fmt: skip
        fine_tune(recipe, "benchmark")

    return run


ON_CARD_ONLY = {"trl_liger": "liger_kernel", "unsloth": "unsloth", "huarizo_fp16": ""}
"""Contenders that need a card, and the package that each needs."""
CONTENDERS: dict[str, Callable[[Task, str, Clock], None]] = {
    "tutorial": tutorial,
    "trainer": trainer,
    "trl": trl,
    "trl_liger": trl_liger,
    "unsloth": unsloth,
    "huarizo_fp32": huarizo("fp32"),
    "huarizo_fp16": huarizo("fp16"),
    "huarizo_bf16": huarizo("bf16"),
    "huarizo_int8": huarizo("int8"),
}


def main(name: str, config: Path, target: Path) -> None:
    from huarizo.machine import device, peak_memory

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[name](Task(**json.loads(config.read_text())), str(Path(folder, "run")), clock)
    target.write_text(json.dumps(clock.result() | {"peak_memory": peak_memory(device())}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
