"""Huarizo: fine-tune causal language models with LoRA on instruction data, on the machine you have."""

from huarizo.host import spin_briefly

spin_briefly()
