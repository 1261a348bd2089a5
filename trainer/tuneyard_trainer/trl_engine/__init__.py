"""TRL's trainers as an engine: they take the steps, and everything around them is ours.

A stage hands a trainer the rows of each step, in our order, and a model that is loaded (and, if
asked for, sharded) here. What follows a step (curves, held-out losses, checkpoints, stop requests)
is the `Course` that the native loop has too. One module per trainer maps settings to its config.
This package contains no loss and no loop.
"""
