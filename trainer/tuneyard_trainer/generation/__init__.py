"""Completing prompts with a model.

It holds greedy generation, sampling with keyed random numbers, their engines, and the completions
of a prompt set with their journal. It may not hold training or the use of completions.
"""
