"""The trained model: loading, LoRA, packed attention, and the loss at labelled positions."""
