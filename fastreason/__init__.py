"""Train language models for reasoning: RL with verifiable rewards, distillation, and both at once."""

__version__ = "0.1.0"
