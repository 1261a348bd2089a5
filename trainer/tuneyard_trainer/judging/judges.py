"""What a judge is asked and what its replies are worth.

A judge decides between two answers, named A and B. It is asked twice, with the answers in either
order, because judges prefer a place as well as an answer (Zheng et al. 2023, arXiv:2306.05685);
where it gives token probabilities they are the label's, normalised over A and B (Lee et al. 2023,
arXiv:2309.00267, section 2.1), and elsewhere its reply is read. A reply that names neither is
nonsense: counted, never a label, and beyond a bound the end of the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import Message

LABELS = ("A", "B")
MODEL_LABEL_TOKENS = 1
"""A model that runs here is asked for no text: its label is read from its probabilities."""
BAD_SHARE = 0.2
LEAST_BAD = 8
"""A stage ends once at least 8 replies and more than a fifth of all are of no use."""
LEAST_MASS = 1e-3
"""Label probabilities below this in sum say that the judge meant something else altogether."""
SHOWN = 3

Disagreement = Literal["drop", "tie", "average"]


@dataclass(frozen=True)
class Ask:
    """One question to a judge."""

    key: str
    """What its reply is known by; unique in a stage."""
    messages: tuple[Message, ...]
    max_tokens: int
    """The longest reply."""
    wants_label: bool
    """Whether the reply shall be A or B; else it is a text."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    key: str
    text: str = ""
    probability: float | None = None
    """Of A, among A and B: 0 or 1 where it was read from the text. None: neither, or no label was
    asked for."""
    mass: float | None = None
    """Of A and B among all tokens. None: the judge gave no probabilities."""
    attempts: int = 1
    """Requests sent for it."""
    tokens: int = 0
    """Of prompt and reply, repeated requests not counted."""
    problem: str | None = None
    """Why there is no reply. None: there is one."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Judge(Protocol):
    """Whoever replies."""

    name: str
    """For the record: the model's name or place."""

    def replies(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        """The replies as they come, in any order; fewer than `asks` where the budget is spent or
        the stage was asked to stop. Raises StageError where asking on is of no use."""
        ...


# ---- labels -------------------------------------------------------------------------------------

_DECORATION = r"[\s*_`\"'(\[{<]*"
_NOUN = r"(?i:(?:the\s+)?(?:(?:better|best|preferred|final)\s+)?(?:answer|response|choice|option))"
_ALONE = re.compile(rf"{_DECORATION}(?:{_NOUN}\W*(?:is\W*)?)?\b([ABab])\b[\s*_`\"')\]}}>.:!]*")
_LEADING = re.compile(rf"{_DECORATION}(?:{_NOUN}\W*(?:is\W*)?)?\b([AB])[*_`\"')\]}}>.:]")
_SENTENCE = re.compile(
    rf"\b{_NOUN}\s+\W?([AB])\b\W*\s+(?:is\s+(?:(?:the|clearly|much|slightly|far)\s+)*"
    r"(?:better|best|preferable|preferred)|follows\b.*\bbetter)",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


def label_of(text: str) -> str | None:
    """The label that a reply names: alone, alone in its first or last line, before a reason ("A. It
    ..."), or in a sentence ("Answer B is better"). None: none, or both."""
    text = _THOUGHT.sub("", text).rpartition("</think>")[2].strip()
    lines = text.splitlines()
    for line in (lines[0], lines[-1]) if lines else ():
        alone = _ALONE.fullmatch(line)
        if alone:
            return alone[1].upper()
    leading = _LEADING.match(text)
    if leading:
        return leading[1]
    named = {match[1].upper() for match in _SENTENCE.finditer(text)}
    return named.pop() if len(named) == 1 else None


def normalised(mass_a: float, mass_b: float) -> tuple[float | None, float]:
    """P(A | A or B) from the two labels' probabilities, None where they are next to nothing, and
    their sum."""
    mass = mass_a + mass_b
    return (mass_a / mass if mass >= LEAST_MASS else None), mass


# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two answers to compare."""

    key: str
    conversation: str
    """What both answer."""
    answers: tuple[str, str]
    principle: str

    def asks(self, question: str, max_tokens: int) -> tuple[Ask, Ask]:
        """The question in both orders; in the second the answers have changed places."""
        first, second = self.answers
        return (
            self._ask("straight", question, first, second, max_tokens),
            self._ask("swapped", question, second, first, max_tokens),
        )

    def _ask(self, order: str, question: str, first: str, second: str, max_tokens: int) -> Ask:
        text = filled(
            question,
            principle=self.principle,
            conversation=self.conversation,
            first=first,
            second=second,
        )
        turn: Message = {"role": "user", "content": text}
        return Ask(f"{self.key}/{order}", (turn,), max_tokens, wants_label=True)


def filled(template: str, **values: str) -> str:
    """The template with {name} replaced, in one pass: what is put in is never itself a template."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return pattern.sub(lambda match: values[match[0][1:-1]], template)


StageOutcome = Literal["first", "second", "tie", "dropped", "unlabelled"]


@dataclass(frozen=True)
class Verdict:
    """What both orders say of a pair. unlabelled: a reply is missing or nonsense."""

    outcome: StageOutcome
    probability: float | None = None
    """That the first answer is better: the mean of both orders. None: unlabelled."""
    agreed: bool = False
    """Whether both orders prefer the same answer."""


def verdict(straight: Reply | None, swapped: Reply | None, disagreement: Disagreement) -> Verdict:
    """A label only where both orders were answered; one answer's word is its place's too."""
    if straight is None or straight.probability is None:
        return Verdict("unlabelled")
    if swapped is None or swapped.probability is None:
        return Verdict("unlabelled")
    p, q = straight.probability, 1 - swapped.probability
    mean = (p + q) / 2
    agreed = (p - 0.5) * (q - 0.5) > 0
    if agreed or (disagreement == "average" and mean != 0.5):
        return Verdict("first" if mean > 0.5 else "second", mean, agreed)
    return Verdict("tie" if disagreement == "tie" else "dropped", mean, agreed)


# ---- patience -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts replies and ends the stage when too many are of no use."""

    judge: str
    replies: int = 0
    nonsense: int = 0
    """Replies without a label where one was asked for, or without any text."""
    failed: int = 0
    """Questions given up."""
    requests: int = 0
    tokens: int = 0
    shown: dict[str, list[str]] = field(default_factory=dict)
    """The first of both kinds."""

    def recall(self, replies: int, requests: int, tokens: int) -> None:
        """Counts what earlier attempts of the stage were replied and used up."""
        self.replies, self.requests, self.tokens = replies, requests, tokens

    def add(self, reply: Reply, *, wants_label: bool) -> None:
        """Raises StageError JudgeNonsense or JudgeUnavailable."""
        self.replies += 1
        self.requests += reply.attempts
        self.tokens += reply.tokens
        if reply.problem is not None:
            self.failed += 1
            self._show("failed", reply.problem)
        elif reply.probability is None and (wants_label or not reply.text.strip()):
            self.nonsense += 1
            self._show("nonsense", repr(reply.text[:80]))
        if self._too_many(LEAST_BAD):
            raise self._error()

    def finish(self) -> None:
        """For a stage too small for the bound: raises where no reply was of use."""
        if self.replies and self.nonsense + self.failed == self.replies:
            raise self._error()

    def useful(self, reply: Reply, *, wants_label: bool) -> bool:
        """Whether it need not be asked for again."""
        if reply.problem is not None:
            return False
        return reply.probability is not None if wants_label else bool(reply.text.strip())

    def metrics(self) -> dict[str, float]:
        return {
            "judgeRequests": float(self.requests),
            "judgeTokens": float(self.tokens),
            "judgeNonsense": float(self.nonsense),
            "judgeFailed": float(self.failed),
        }

    def _show(self, kind: str, text: str) -> None:
        shown = self.shown.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(text)

    def _too_many(self, least: int) -> bool:
        worst = max(self.nonsense, self.failed)
        return worst >= least and worst > BAD_SHARE * self.replies

    def _error(self) -> StageError:
        if self.failed >= self.nonsense:
            return StageError(
                "JudgeUnavailable",
                f"the judge {self.judge} left {self.failed} of {self.replies} questions without a "
                f"reply: {'; '.join(self.shown['failed'])}.",
                advice="Look after the endpoint, or raise timeoutSeconds or maxAttempts of "
                "judge.endpoint, or lower its concurrency; where questions are too long, lower "
                "maxNewTokens. What was replied so far is kept.",
                retryable=True,
            )
        return StageError(
            "JudgeNonsense",
            f"{self.nonsense} of {self.replies} replies of the judge {self.judge} decide nothing "
            f"or are empty: {', '.join(self.shown['nonsense'])}.",
            advice="Choose a stronger judge, ask it more plainly (question, critiqueRequest, "
            "revisionRequest), or, of one that thinks aloud first, raise "
            "judge.endpoint.labelTokens.",
        )
