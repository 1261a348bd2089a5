"""Prompts for judges, and the labels in their replies.

A judge decides between two completions, labeled A and B. Each pair is sent in both orders because
judges have a position bias (Zheng et al. 2023, arXiv:2306.05685). The label's probability comes
from the judge's token probabilities, normalized over A and B (Lee et al. 2023, arXiv:2309.00267,
section 2.1), or from the text of the reply if the judge gives none. A reply that names neither is
invalid: it is counted, it is never a label, and too many of them fail the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.conversations import Message

LABELS = ("A", "B")
MODEL_LABEL_TOKENS = 1
"""The reply length of a model that runs in the stage: its label comes from the probabilities of one
token."""
MAX_INVALID_SHARE = 0.2
MIN_INVALID = 8
"""A stage fails if at least 8 replies and more than a fifth of all replies are invalid."""
MIN_LABEL_MASS = 1e-3
"""If the probabilities of A and B have a smaller sum, the reply is neither A nor B."""
SHOWN_PROBLEMS = 3
JUDGE = "judge"
"""The field of a judge in the manifest."""

Disagreement = Literal["drop", "tie", "average"]


@dataclass(frozen=True)
class JudgePrompt:
    """One prompt for a judge."""

    key: str
    """Identifies the prompt and its reply within a stage."""
    messages: tuple[Message, ...]
    max_tokens: int
    """The longest reply."""
    wants_label: bool
    """Whether the reply must be A or B. False: it may be any text."""


@dataclass(frozen=True)
class Reply:
    """A judge's reply to one prompt."""

    key: str
    text: str = ""
    probability: float | None = None
    """Of A, normalized over A and B; 0 or 1 if it comes from the text. None: the reply names
    neither, or the prompt wants no label."""
    mass: float | None = None
    """The sum of the probabilities of A and B among all tokens. None: the judge gave none."""
    attempts: int = 1
    """Requests sent for this reply."""
    tokens: int = 0
    """Tokens of prompt and reply, without those of repeated requests."""
    problem: str | None = None
    """The reason why there is no reply. None: there is a reply."""

    def is_valid(self, prompt: JudgePrompt) -> bool:
        """Return whether the reply has what its prompt wants: a label, or text."""
        if self.problem is not None:
            return False
        return self.probability is not None if prompt.wants_label else bool(self.text.strip())

    def as_json(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def turn(role: str, content: str) -> Message:
    """Return one turn of a conversation."""
    return {"role": role, "content": content}


class Judge(Protocol):
    """A model that replies to prompts."""

    name: str
    """The model's name or URI, for records."""

    def replies(self, prompts: Sequence[JudgePrompt]) -> Iterator[Reply]:
        """Yield replies as they arrive, in any order. There are fewer than `prompts` if the budget
        is spent or the stage was asked to stop. Raises StageError if no prompt can succeed."""
        ...


# ---- labels -------------------------------------------------------------------------------------

_MARKUP = r"[\s*_`\"'(\[{<]*"
_NOUN = r"(?i:(?:the\s+)?(?:(?:better|best|preferred|final)\s+)?(?:answer|response|choice|option))"
_ALONE = re.compile(rf"{_MARKUP}(?:{_NOUN}\W*(?:is\W*)?)?\b([ABab])\b[\s*_`\"')\]}}>.:!]*")
_LEADING = re.compile(rf"{_MARKUP}(?:{_NOUN}\W*(?:is\W*)?)?\b([AB])[*_`\"')\]}}>.:]")
_SENTENCE = re.compile(
    rf"\b{_NOUN}\s+\W?([AB])\b\W*\s+(?:is\s+(?:(?:the|clearly|much|slightly|far)\s+)*"
    r"(?:better|best|preferable|preferred)|follows\b.*\bbetter)",
    re.IGNORECASE,
)
_REASONING = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


def label_of(text: str) -> str | None:
    """Return the label that a reply names. None: it names none, or both.

    The label may be the whole first or last line, the start before a reason ("A. It ..."), or part
    of a sentence ("Answer B is better").
    """
    text = _REASONING.sub("", text).rpartition("</think>")[2].strip()
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


def normalize(mass_a: float, mass_b: float) -> tuple[float | None, float]:
    """Return P(A | A or B) from the probabilities of the two labels, and their sum. None: the sum
    is below MIN_LABEL_MASS."""
    mass = mass_a + mass_b
    return (mass_a / mass if mass >= MIN_LABEL_MASS else None), mass


# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two completions of one conversation to compare."""

    key: str
    conversation: str
    completions: tuple[str, str]
    principle: str

    def prompts(self, question: str, max_tokens: int) -> tuple[JudgePrompt, JudgePrompt]:
        """Return the comparison in both orders; the second one swaps the completions."""
        first, second = self.completions
        return (
            self._prompt("straight", question, first, second, max_tokens),
            self._prompt("swapped", question, second, first, max_tokens),
        )

    def _prompt(
        self, order: str, question: str, first: str, second: str, max_tokens: int
    ) -> JudgePrompt:
        text = fill_template(
            question,
            principle=self.principle,
            conversation=self.conversation,
            first=first,
            second=second,
        )
        key = f"{self.key}/{order}"
        return JudgePrompt(key, (turn("user", text),), max_tokens, wants_label=True)


def fill_template(template: str, **values: str) -> str:
    """Return the template with each {name} replaced. Braces in a value are not replaced again."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return pattern.sub(lambda match: values[match[0][1:-1]], template)


Outcome = Literal["first", "second", "tie", "dropped", "unlabeled"]


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on a pair, from the replies in both orders."""

    outcome: Outcome
    """unlabeled: a reply is missing or invalid."""
    probability: float | None = None
    """That the first completion is better: the mean of both orders. None: unlabeled."""
    agreed: bool = False
    """Whether both orders prefer the same completion."""


def verdict(straight: Reply | None, swapped: Reply | None, disagreement: Disagreement) -> Verdict:
    """Return the verdict of both orders. One order alone cannot separate a preference from position
    bias, so a pair with one reply is unlabeled."""
    if straight is None or straight.probability is None:
        return Verdict("unlabeled")
    if swapped is None or swapped.probability is None:
        return Verdict("unlabeled")
    p, q = straight.probability, 1 - swapped.probability
    mean = (p + q) / 2
    agreed = (p - 0.5) * (q - 0.5) > 0
    if agreed or (disagreement == "average" and mean != 0.5):
        return Verdict("first" if mean > 0.5 else "second", mean, agreed)
    return Verdict("tie" if disagreement == "tie" else "dropped", mean, agreed)


# ---- invalid replies ----------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of replies, which fail the stage if too many are invalid."""

    judge: str
    path: str = JUDGE
    """The field of the judge in the manifest, for messages."""
    replies: int = 0
    nonsense: int = 0
    """Replies without a label to a prompt that wants one, or without any text."""
    failed: int = 0
    """Prompts that got no reply."""
    requests: int = 0
    tokens: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    """The first texts of invalid replies ("nonsense") and the first reasons of failures
    ("failed")."""

    def add(self, reply: Reply, *, valid: bool) -> None:
        """Count a reply. Raises StageError JudgeNonsense or JudgeUnavailable."""
        self.replies += 1
        self.requests += reply.attempts
        self.tokens += reply.tokens
        if reply.problem is not None:
            self.failed += 1
            self._keep("failed", reply.problem)
        elif not valid:
            self.nonsense += 1
            self._keep("nonsense", repr(reply.text[:80]))
        most = max(self.nonsense, self.failed)
        if most >= MIN_INVALID and most > MAX_INVALID_SHARE * self.replies:
            raise self._error()

    def finish(self) -> None:
        """Raise StageError if no reply was valid, for stages with fewer than MIN_INVALID
        prompts."""
        if self.replies and self.nonsense + self.failed == self.replies:
            raise self._error()

    def metrics(self) -> dict[str, float]:
        """Return the counts as the stage's metrics."""
        return {
            "judgeRequests": float(self.requests),
            "judgeTokens": float(self.tokens),
            "judgeNonsense": float(self.nonsense),
            "judgeFailed": float(self.failed),
        }

    def _keep(self, kind: str, text: str) -> None:
        kept = self.problems.setdefault(kind, [])
        if len(kept) < SHOWN_PROBLEMS:
            kept.append(text)

    def _error(self) -> StageError:
        if self.failed >= self.nonsense:
            return StageError(
                "JudgeUnavailable",
                f"the judge {self.judge} did not reply to {self.failed} of {self.replies} prompts: "
                f"{'; '.join(self.problems['failed'])}.",
                advice="Check the endpoint. Raise timeoutSeconds or maxAttempts of "
                f"{self.path}.endpoint, or lower its concurrency; if the prompts are too long, "
                "lower maxNewTokens. The replies so far are kept.",
                retryable=True,
            )
        if self.path != JUDGE:
            return StageError(
                "JudgeNonsense",
                f"{self.nonsense} of {self.replies} replies of {self.judge} are empty.",
                advice=f"Choose another model in {self.path}, or make the requests plainer.",
            )
        return StageError(
            "JudgeNonsense",
            f"{self.nonsense} of {self.replies} replies of the judge {self.judge} name neither A "
            f"nor B, or are empty: {', '.join(self.problems['nonsense'])}.",
            advice="Choose a stronger judge, or make question, critiqueRequest or revisionRequest "
            "plainer. For a judge that reasons first, raise judge.endpoint.labelTokens.",
        )
