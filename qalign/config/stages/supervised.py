"""The section of supervised fine-tuning."""

from qalign.config.stages.section import Batch, Data, LearningRate, Positive, Stage


class SFT(Stage):
    """Supervised fine-tuning: the model learns to give the answers of example dialogues."""

    data: Data
    """Training data: dialogues, prompts with completions, plain texts, or the chosen side of preference pairs."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate: reached after the warm-up; higher than for DPO, because a raw base has much to learn. Use
    1e-4 for a model that can already chat; halve it if the held-out loss rises."""
    batch_size: Batch = 16
    """Batch size: rows in one optimiser step; with `packing`, packed rows of `max_length` tokens."""
    packing: bool = False
    """Sequence packing: puts several dialogues, which can't attend to each other, into one row of `max_length` tokens
    to avoid padding. Leave it off for a few hundred short dialogues, which fill very few rows."""
    neftune_alpha: Positive | None = None
    """NEFTune noise α (arXiv:2310.05914): adds noise to the embeddings during training; off when left out. 5 is usual.
    Try it with few dialogues; answers may get longer."""
