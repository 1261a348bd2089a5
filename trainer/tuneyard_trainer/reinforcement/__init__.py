"""Reinforcement learning: the stages `ppo` and `grpo` (GRPO and RLOO).

It holds rollouts, rewards, advantages, the update of the policy and the conditions that end a run
early. `arithmetic` holds the formulas as pure functions.
It may not use preference losses, judges or evaluation.
"""
