"""Training over a fixed data set: the stages `sft` and `pretrain`.

It holds the training loop and its parts: batches, losses, schedules, seeds, checkpoints.
It does not know preferences, rewards or generation.
"""
