"""Judgement without a trained reward: principles, a model that judges by them, and what other judges say."""
