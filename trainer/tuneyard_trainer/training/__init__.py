"""Training over a fixed data set: the stages `sft` and `pretrain`.

What lives here: the training loop and its parts: batches, losses, schedules, seeds, checkpoints.
What may not enter: preferences, rewards, generation.
"""
