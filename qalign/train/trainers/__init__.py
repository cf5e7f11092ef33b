"""The loops of the stages that learn from data: `Trainer`s of one adapter."""
