"""Huarizo: fine-tune Llama-architecture models with LoRA on instruction data, on the machine you have."""
