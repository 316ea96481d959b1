"""The model that is trained: loading, LoRA, packed attention, and the loss at labelled positions."""
