"""augment: new training rows from those of the job, for the stage `prepare`.

A model asks questions in other words, or writes new questions for answers (instruction
backtranslation, Li et al. 2023, arXiv:2308.06259); templates repeat questions in other formats.
Writes `augmented.jsonl`, whose rows are marked (`data.augmentation`). The data is read three times:
to choose rows, to write requests, and to write rows, so that memory holds 24 bytes for a row, and
the requests and the replies. Rows that differ in a later reading end the stage, since replies
belong to rows by their numbers. A journal keeps the replies, so that a stage that is killed and
restarted repeats no request.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import AugmentSettings, ChatSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import augmentation
from tuneyard_trainer.data.augmentation import By
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.excerpts import excerpt
from tuneyard_trainer.data.reading.example import Example, Origin
from tuneyard_trainer.data.reading.stream import examples
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.generation.completions import Policy
from tuneyard_trainer.judging.judges import JudgePrompt, Reply, fill_template, turn
from tuneyard_trainer.judging.session import JudgeSession, open_journal
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.storage.journal import lines
from tuneyard_trainer.worker import StageContext, StageOutcome

ROWS = "augmented.jsonl"
REPORTED_ROWS = 1000
"""Rows between two reports of progress."""
SHOWN = 3
"""The replies that are not used, and are shown for each reason."""


def run(context: StageContext) -> StageOutcome:
    """Write the new rows. If the job runs the model that writes, all workers share the requests.

    Raises StageError NothingAugmented, BudgetSpent, JudgeUnusable, the errors of the judge and of
    invalid rows.
    """
    settings = context.settings(AugmentSettings)
    if settings.kind == "augment":  # the other workers do not run this stage
        context = replace(context, worker=context.worker.alone)
    with SharedStage(context.worker) as shared:
        return _run(context, shared, settings)


def _run(context: StageContext, shared: SharedStage, settings: AugmentSettings) -> StageOutcome:
    as_messages = _has_chat_template(context.inputs["model"], settings.chat_template)
    originals = Originals(context, settings, shared, as_messages=as_messages)
    choice = shared.from_main(lambda: Choice.of(originals, settings))
    prompts = shared.from_main(lambda: list(_prompts(originals, choice, settings)))
    journal = open_journal(context, shared) if prompts else nullcontext()
    with journal as opened:
        session = None
        if opened is not None:
            path = f"{_field(context)}.by"
            session = JudgeSession.of(context, shared, settings.judge, opened, path)
            _request(context, session, settings, prompts)
    if not context.worker.is_main:
        return StageOutcome()
    writer = RowWriter(
        choice,
        settings,
        session.replies if session else {},
        session.judge if session else "",
        as_messages=as_messages,
    )
    writer.write(originals, context.workdir / ROWS)
    if not sum(writer.made.values()):
        raise _nothing_augmented(context, choice, session, writer)
    details: dict[str, Any] = {"unusable": dict(choice.unusable), "leftOut": writer.left_out()}
    metrics = writer.metrics(len(choice.contents))
    if session:
        details |= {"by": session.judge, "problems": session.tally.problems}
        metrics |= session.metrics()
    return StageOutcome(metrics, details, contents=(ROWS,))


def _field(context: StageContext) -> str:
    """Return the field of the augmentation in the manifest."""
    source = context.stage.inputs["train.0"]
    path = source.path if isinstance(source, SourceInput) else ""
    return f"{path.rpartition('.train[')[0]}.augment".lstrip(".")


# ---- the originals ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Originals:
    """The rows with a question that the job trains on, after the rules of cleaning. To be iterated
    over as often as they are needed."""

    context: StageContext
    settings: AugmentSettings
    shared: SharedStage
    as_messages: bool
    """Whether the model has a chat template. Without one it takes a prompt and its completion
    alone."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows that are not augmented, by reason, over all iterations."""
    _first: array[int] = field(default_factory=lambda: array("Q"))
    """Hashes of what the rows said in the first iteration."""

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """Yield the index of the data set and the row. Raises StageError as `examples` does, and
        SourceUnavailable if the rows are not those of the first iteration; and Interrupted."""
        is_first = not self._first
        number = 0
        for index, example in self._read():
            content = augmentation.content_hash(example)
            if is_first:
                self._first.append(content)
            elif number == len(self._first) or self._first[number] != content:
                raise self._changed(index)
            number += 1
            yield index, example
        if number < len(self._first):
            raise self._changed(len(self.settings.train) - 1)

    def _changed(self, index: int) -> StageError:
        source = self.context.stage.inputs[f"train.{index}"]
        path = source.path if isinstance(source, SourceInput) else f"train.{index}"
        return StageError(
            "SourceUnavailable",
            f"the rows of {path.removesuffix('.uri')} changed while new rows were made of them.",
            advice="Leave the files as they are while a job reads them, and run the job again.",
            retryable=True,
        )

    def _read(self) -> Iterator[tuple[int, Example]]:
        cleaner = Cleaner.of(self.settings.clean)
        count = 0
        for index, dataset in enumerate(self.settings.train):
            role = f"train.{index}"
            source = self.context.stage.inputs[role]
            path = source.path if isinstance(source, SourceInput) else ""
            name = path.removesuffix(".uri") or role
            if self.settings.documents:
                column = dataset.fields.document or augmentation.DOCUMENT
                fields = dataset.fields.model_copy(update={"document": column})
                dataset = dataset.model_copy(update={"fields": fields})
            stream = examples(
                self.context.inputs[role],
                dataset,
                on_invalid=self.settings.on_invalid_row,
                name=name,
            )
            for example in stream:
                self.shared.check_stop()
                count += 1
                if not count % REPORTED_ROWS:
                    self.context.worker.report(step=count, message=f"reading {name}")
                cleaned = cleaner(example)
                if cleaned.removed_by is not None:
                    self.unusable[cleaned.removed_by] += 1
                elif not augmentation.has_question(cleaned.example):
                    self.unusable["noQuestion"] += 1
                elif not self.as_messages and example.kind != "completion":
                    self.unusable["noChatTemplate"] += 1
                else:
                    yield index, cleaned.example


@dataclass(frozen=True)
class Choice:
    """Which of the originals are rewritten. (R,): one value for each original, in their order."""

    contents: NDArray[np.uint64]
    """(R,) hashes of what they say, sorted."""
    paraphrased: NDArray[np.bool_]
    inverted: NDArray[np.bool_]
    several_turns: int
    """Originals that cannot be inverted."""
    unusable: Mapping[str, int]
    """Rows that are no originals, by reason."""

    @classmethod
    def of(cls, originals: Originals, settings: AugmentSettings) -> Choice:
        """Read the originals, and choose by the shares of the settings."""
        contents: list[int] = []
        simple: list[bool] = []
        for _, example in originals:
            contents.append(augmentation.content_hash(example))
            simple.append(augmentation.is_one_question(example))
        every, pairs = np.ones(len(contents), dtype=np.bool_), np.array(simple, dtype=np.bool_)
        none = np.zeros(len(contents), dtype=np.bool_)
        paraphrase, inversion = settings.paraphrase, settings.inversion

        def chosen(rows: NDArray[np.bool_], share: float, by: By) -> NDArray[np.bool_]:
            return augmentation.chosen(contents, rows, share, f"{settings.seed}/{by}")

        return cls(
            np.sort(np.array(contents, dtype=np.uint64)),
            chosen(every, paraphrase.share, "paraphrase") if paraphrase else none,
            chosen(pairs, inversion.share, "inversion") if inversion else none,
            int((~pairs).sum()) if inversion else 0,
            dict(originals.unusable),
        )

    def knows(self, content: int) -> bool:
        """Return whether an original has this content."""
        place = int(np.searchsorted(self.contents, np.uint64(content)))
        return place < len(self.contents) and int(self.contents[place]) == content


# ---- requests -----------------------------------------------------------------------------------


def _prompts(
    originals: Originals, choice: Choice, settings: AugmentSettings
) -> Iterator[JudgePrompt]:
    """Yield the requests: the first paraphrase of all rows, the new questions, then the second
    paraphrases, and so on, so that a budget covers as many rows as possible."""
    paraphrase, inversion = settings.paraphrase, settings.inversion
    if paraphrase is None and inversion is None:
        return
    kinds: list[list[JudgePrompt]] = [[] for _ in (paraphrase.requests if paraphrase else ())]
    questions: list[JudgePrompt] = []
    for row, (_, example) in enumerate(originals):
        asked = augmentation.question(example)
        if paraphrase and choice.paraphrased[row]:
            for number, request in enumerate(paraphrase.requests):
                text = fill_template(request, prompt=asked)
                kinds[number].append(_prompt(_key(row, "paraphrase", number), text, settings))
        if inversion and choice.inverted[row]:
            answer = augmentation.answer(example)
            text = fill_template(inversion.request, prompt=asked, answer=answer)
            questions.append(_prompt(_key(row, "inversion", 0), text, settings))
    for batch in (*kinds[:1], questions, *kinds[1:]):
        yield from batch


def _key(row: int, by: By, number: int) -> str:
    return f"{row}/{by}-{number}"


def _prompt(key: str, text: str, settings: AugmentSettings) -> JudgePrompt:
    return JudgePrompt(key, (turn("user", text),), settings.max_new_tokens, wants_label=False)


def _request(
    context: StageContext,
    session: JudgeSession,
    settings: AugmentSettings,
    prompts: Sequence[JudgePrompt],
) -> None:
    """Request the missing replies. Raises StageError JudgeUnusable for a model of the job that has
    no chat template, and as `JudgeSession.request` does."""
    if all(prompt.key in session.replies for prompt in prompts):
        return
    chat = ChatSettings(system_prompt=None, chat_template=settings.chat_template)
    policy = Policy.of(context.inputs, chat, context.worker)
    foreign = context.inputs.get("judge")
    if settings.judge is None:
        template = None if foreign else settings.chat_template
        if not _has_chat_template(foreign or context.inputs["model"], template):
            raise StageError(
                "JudgeUnusable",
                f"{session.judge} has no chat template, so it does not follow requests to rewrite "
                "a question.",
                advice=f"Name a model that has one, or an endpoint, in {session.tally.path}; or "
                "ask for templates alone.",
            )
    session.request(session.open_judge_or(policy), prompts, "requesting questions")


def _has_chat_template(model: Path, template: str | None) -> bool:
    return bool(template or load_tokenizer(model).chat_template)


# ---- rows ---------------------------------------------------------------------------------------


@dataclass
class RowWriter:
    """Makes the new rows, and counts them and the replies that are not used."""

    choice: Choice
    settings: AugmentSettings
    replies: Mapping[str, Reply]
    model: str
    """The name of the model that replied."""
    as_messages: bool
    made: Counter[By] = field(default_factory=Counter)
    lost: Counter[tuple[By, str]] = field(default_factory=Counter)
    shown: dict[tuple[By, str], list[str]] = field(default_factory=dict)
    _written: set[int] = field(default_factory=set)
    """Hashes of the rows that a model made: short answers of several rows get one question."""

    def write(self, originals: Originals, path: Path) -> None:
        """Write the new rows of each original, in the order of the originals."""
        if self.choice.several_turns:
            self.lost["inversion", "severalTurns"] = self.choice.several_turns
        with path.open("wb", buffering=1 << 20) as file:
            for row, (dataset, example) in enumerate(originals):
                file.write(lines(self._rows(row, dataset, example)))

    def _rows(self, row: int, dataset: int, example: Example) -> Iterator[dict[str, Any]]:
        known: set[int] = set()
        for by, text in self._questions(row, example):
            new = augmentation.with_question(example, text)
            content = augmentation.content_hash(new)
            is_known = content in known or content in self._written
            if is_known or self.choice.knows(content):
                self._lose(by, "duplicate", example, text)
                continue
            (known if by == "template" else self._written).add(content)
            self.made[by] += 1
            model = "" if by == "template" else self.model
            origin = Origin(by, dataset, example.file, example.row, example.number, model)
            yield augmentation.as_row(new, origin, as_messages=self.as_messages)

    def _questions(self, row: int, example: Example) -> Iterator[tuple[By, str]]:
        """Yield the new questions of a row, with what made each of them."""
        paraphrase = self.settings.paraphrase
        if paraphrase and self.choice.paraphrased[row]:
            for number in range(len(paraphrase.requests)):
                yield from self._replied(row, "paraphrase", number, example)
        if self.choice.inverted[row]:
            yield from self._replied(row, "inversion", 0, example)
        asked = augmentation.question(example)
        for template in self.settings.templates:
            yield "template", template.replace(augmentation.PROMPT, asked)

    def _replied(self, row: int, by: By, number: int, example: Example) -> Iterator[tuple[By, str]]:
        """Yield the question in a reply, if it can be used."""
        reply = self.replies.get(_key(row, by, number))
        if reply is None:
            self._lose(by, "noReply", example, "")
            return
        text = augmentation.bare_reply(reply.text)
        fault = augmentation.fault(text, example, by)
        if fault:
            self._lose(by, fault, example, reply.text)
        else:
            yield by, text

    def _lose(self, by: By, reason: str, example: Example, text: str) -> None:
        self.lost[by, reason] += 1
        shown = self.shown.setdefault((by, reason), [])
        if len(shown) < SHOWN:
            where = f"{example.file} row {example.row}".strip()
            shown.append(f"{where}: {excerpt(text)}" if text else where)

    def left_out(self) -> dict[str, Any]:
        """Return the replies that are not used as JSON, by what was asked for and by reason."""
        found: dict[str, Any] = {}
        for by, reason in sorted(self.lost):
            count, examples = self.lost[by, reason], self.shown.get((by, reason), [])
            found.setdefault(by, {})[reason] = {"rows": count, "examples": examples}
        return found

    def metrics(self, originals: int) -> dict[str, float]:
        """Return the counts of rows. `originals`: rows that could be augmented."""
        return {
            "augmentedRows": float(sum(self.made.values())),
            "originalRows": float(originals),
            "paraphrases": float(self.made["paraphrase"]),
            "inversions": float(self.made["inversion"]),
            "templatedRows": float(self.made["template"]),
            "leftOutRows": float(sum(self.lost.values())),
        }


def _nothing_augmented(
    context: StageContext, choice: Choice, session: JudgeSession | None, writer: RowWriter
) -> StageError:
    if session and session.budget.exhausted:
        return session.budget_spent("any row was augmented")
    reasons = {f"{by}: {reason}": count for (by, reason), count in writer.lost.items()}
    reasons |= choice.unusable
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    field = _field(context)
    remedy = f"Name another model in {field}.by" if session else "Add rows with other questions"
    return StageError(
        "NothingAugmented",
        f"no row was made of {len(choice.contents)} rows with a question ({found}).",
        advice=f"{remedy}, or remove {field}.",
    )
