"""LoRA adapters: their files, the layers that they fit, their weights on a base."""
