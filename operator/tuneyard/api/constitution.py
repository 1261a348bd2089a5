"""How a judge is asked where the manifest does not say: written for Tuneyard, in the spirit of Lee
et al. 2023 (arXiv:2309.00267) and Bai et al. 2022 (arXiv:2212.08073, appendix C)."""

from __future__ import annotations

COMPARISON = """\
Below are a conversation and two answers to its last message. Decide which answer follows this \
principle better.

Principle: {principle}

Conversation:
{conversation}

Answer A:
{first}

Answer B:
{second}

Which answer follows the principle better? Reply with one letter: A or B."""
"""Asks for a preference; the answers change places for the second question."""

CRITIQUE = """\
Criticise your last answer by this principle: {principle}

Say in a few sentences where the answer falls short of it and what would have to change. Do not \
write a new answer yet."""
"""Asks for a critique."""

REVISION = """\
Now answer the original message anew, and repair what your critique found. The new answer must \
follow this principle: {principle}

Write the new answer only, without a word about the critique or the change."""
"""Asks for the revision."""
