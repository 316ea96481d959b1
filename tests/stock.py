"""What Huarizo is compared with, written with stock Transformers and PEFT alone: no import of huarizo here."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments


def tutorial_text(row: dict[str, str]) -> str:
    """The tutorial's prompt with the answer behind it."""
    if row["input"]:
        head = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}"
    else:
        head = f"### Instruction:\n{row['instruction']}"
    return f"{head}\n\n### Response:\n{row['output']}"


class TutorialRows(Dataset):
    """Texts tokenised and padded to 512, as the tutorial does."""

    def __init__(self, rows: list[dict[str, str]], tokenizer: Any, max_length: int = 512) -> None:
        texts = [tutorial_text(row) for row in rows]
        self.encoded = tokenizer(texts, truncation=True, padding="max_length", max_length=max_length)

    def __len__(self) -> int:
        return len(self.encoded["input_ids"])

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {key: self.encoded[key][index] for key in ("input_ids", "attention_mask")}


def tutorial_run(
    folder: Path,
    rows: list[dict[str, str]],
    tokenizer: Any,
    out: Path,
    steps: int,
    dropout: float,
    max_length: int = 512,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The tutorial's Trainer run in fp32: the loss of each step, and the adapter's weights at the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(42)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out), per_device_train_batch_size=4, num_train_epochs=1, max_steps=steps, learning_rate=2e-4,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=42,
        ),
        train_dataset=TutorialRows(rows, tokenizer, max_length),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, weights


def padded_loss_and_gradients(
    model: Any, examples: list[dict[str, list[int]]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the labelled tokens, and every trainable gradient, of the examples padded to the longest."""
    width = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([list(e[key]) + [value] * (width - len(e[key])) for e in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    model.zero_grad()
    loss = model(input_ids=padded("input_ids", 0), attention_mask=mask, labels=padded("labels", -100)).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
