"""The vocabularies of two models whose distributions are compared token by token."""

from __future__ import annotations

from pathlib import Path

from tuneyard.errors import StageError
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.files import config_of

SHOWN = 3
"""Tokens that the message shows."""


def require_same_vocabulary(student: Path, teacher: Path) -> None:
    """Raise StageError VocabularyMismatch unless the models in two folders have the same tokens
    with the same ids, and equally many logits. Reads no weights."""
    sizes = [config_of(path).get_text_config().vocab_size for path in (student, teacher)]
    ours, theirs = (load_tokenizer(path).get_vocab() for path in (student, teacher))
    differing = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    )
    if differing:
        shown = ", ".join(
            f"{token!r} ({ours.get(token, 'missing')} and {theirs.get(token, 'missing')})"
            for token in differing[:SHOWN]
        )
        raise _mismatch(
            f"the teacher's tokenizer differs from the model's in {len(differing)} of "
            f"{len(ours)} tokens, such as {shown}."
        )
    if sizes[0] != sizes[1]:
        raise _mismatch(
            f"the model has {sizes[0]} logits and the teacher {sizes[1]}, although both have the "
            "same tokenizer."
        )


def _mismatch(message: str) -> StageError:
    return StageError(
        "VocabularyMismatch",
        f"{message} A distillation compares the probabilities of the same tokens.",
        advice="Set optimize.distill.teacher.uri to a larger model of the same family and size of "
        "vocabulary, or change spec.model.uri.",
    )
