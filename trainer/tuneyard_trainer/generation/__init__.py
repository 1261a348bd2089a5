"""How a model completes prompts.

What lives here: greedy generation, sampling whose random numbers are keyed, and the vLLM engine.
What may not enter: training, and what completions are used for.
"""
