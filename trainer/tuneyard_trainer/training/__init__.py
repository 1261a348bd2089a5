"""Training over a fixed data set: the stages `sft` and `pretrain`.

It holds the training loop and its parts: batches, losses, schedules, seeds, checkpoints and the
history of metrics; `preference` and `reinforcement` use these parts too.
It may not use preferences, rewards or generation.
"""
