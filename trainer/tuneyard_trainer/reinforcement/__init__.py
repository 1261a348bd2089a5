"""Reinforcement learning: the stages `ppo` and `grpo` (GRPO and RLOO).

This package holds rollouts, rewards, advantages and the update of the policy. `arithmetic` holds
the formulas as pure functions. Preference losses, judges and evaluation have packages of their own.
"""
