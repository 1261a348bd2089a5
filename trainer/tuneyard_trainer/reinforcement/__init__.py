"""Learning from rewards: the stages `ppo` and `grpo` (RLOO too).

What lives here: rollouts, rewards, advantages, and the update of the policy. `arithmetic` holds the
formulas as pure functions. What may not enter: preference losses, judges, evaluation.
"""
