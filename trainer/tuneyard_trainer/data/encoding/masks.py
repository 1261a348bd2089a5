"""Proof of masks: checks of a data set's targets, and a row's text with its targets marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.reading.example import Example


class Run(NamedTuple):
    """A part of a row's text."""

    text: str
    trained: bool
    """Whether its tokens are targets."""


def runs(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> list[Run]:
    """Return a row's text in parts that are targets and parts that are not, in order.

    A part is decoded as a whole, since a token may be a piece of a character.
    """
    positions = range(len(row.ids))
    parts = groupby(positions, key=lambda position: bool(row.mask[position]))
    return [
        Run(str(tokenizer.decode([int(row.ids[i]) for i in part])), trained)
        for trained, part in parts
    ]


@dataclass
class MaskProof:
    """Facts about the masks of one data set's rows. Documents do not count: all of their tokens are
    targets, and a truncated one has no end."""

    rows: int = 0
    whole: bool = True
    """Whether every token up to the last target of every row so far is a target: templates write
    white space after it."""
    ended: bool = False
    """Whether a stop token of any row so far is a target."""

    def add(self, example: Example, pieces: Sequence[Encoded], encoder: Encoder) -> None:
        """Count a row, after it is truncated or split. `pieces`: its sequences."""
        if example.kind == "text" or not pieces:
            return
        self.rows += 1
        if self.whole:
            self.whole = all(_is_whole(piece) for piece in pieces)
        if not self.ended:
            stops = list(encoder.stop_tokens)
            self.ended = any(np.isin(piece.ids[piece.mask == 1], stops).any() for piece in pieces)

    def update(self, later: MaskProof) -> None:
        """Add the facts about rows that follow."""
        self.rows += later.rows
        self.whole &= later.whole
        self.ended |= later.ended

    def check(self, name: str, encoder: Encoder) -> None:
        """Raise StageError NoStopToken if no row trains a stop token, and ContextTrained if every
        token of every conversation is a target although the job trains on answers, or if the chat
        template marks other text than the answers. `name`: the data set's field in the
        manifest."""
        if self.rows and not self.ended:
            raise StageError(
                "NoStopToken",
                f"none of the {self.rows} rows of {name} has a stop token among its targets, so a "
                "tuned model could not stop.",
                advice="Raise the maxLength if it cuts the answers off, or set "
                "spec.data.chatTemplate to a template that writes {{ eos_token }} after each "
                "answer.",
            )
        # Without a chat template, a prompt of one token leaves no token that is not a target.
        has_context = encoder.tokenizer.chat_template and encoder.train_on != "all"
        if self.rows and has_context and (self.whole or encoder.blocks_are_wrong):
            problem = (
                f"every token of the {self.rows} conversations of {name} is a target, also those "
                "of the questions"
                if self.whole
                else "the {% generation %} blocks of the chat template mark other text than the "
                f"answers in the {self.rows} conversations of {name}"
            )
            raise StageError(
                "ContextTrained",
                f"{problem}, although trainOn is {encoder.train_on}.",
                advice="Correct the {% generation %} blocks of spec.data.chatTemplate, or set "
                "spec.data.trainOn: all.",
            )


def _is_whole(piece: Encoded) -> bool:
    """Return whether every token up to the last target is one, but the first, which never is."""
    targets = np.flatnonzero(piece.mask)
    return bool(len(targets)) and len(targets) == targets[-1]
