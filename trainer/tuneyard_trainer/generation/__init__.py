"""Completing prompts with a model.

Holds greedy generation, sampling with keyed random numbers, and the vLLM engine. Training and the
use of completions do not belong here.
"""
