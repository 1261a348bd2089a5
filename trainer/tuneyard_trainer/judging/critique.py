"""critique: the supervised stage of constitutional AI (Bai et al. 2022, section 3).

The policy completes each prompt. A critic, which is the policy itself or a judge, criticizes the
completion by a principle and revises it, for several rounds. Writes the last revisions to
`revisions.jsonl`, whose rows the stage `prepare` reads, and all rounds to `critiques.jsonl`. A
journal keeps completions and replies, so that a stage that is killed and restarted repeats neither.
Paper: arXiv:2212.08073.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import CritiqueSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import transcript
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.generation.completions import Completion, Policy, sample_completions
from tuneyard_trainer.judging.judges import Judge, JudgePrompt, fill_template, turn
from tuneyard_trainer.judging.session import JudgeSession, open_journal
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.journal import lines
from tuneyard_trainer.worker import StageContext, StageOutcome

REVISIONS, CRITIQUES = "revisions.jsonl", "critiques.jsonl"
TEMPERATURE = 1.0
"""The first completions are sampled from the policy's own distribution, faults included."""


def run(context: StageContext) -> StageOutcome:
    """Sample, criticize and revise completions, and write the revisions. All workers share the
    work, and rank 0 writes.

    Raises StageError NoRevisions, BudgetSpent and the errors of the judge.
    """
    with SharedStage(context.worker) as shared:
        return _run(context, shared)


def _run(context: StageContext, shared: SharedStage) -> StageOutcome:
    settings = context.settings(CritiqueSettings)
    policy = Policy.of(context.inputs, settings.chat, context.worker)
    limit = settings.max_new_tokens
    prompts = shared.from_main(
        lambda: policy.prompts(settings.prompts, limit, "constitution.prompts")
    )
    with open_journal(context, shared) as journal:
        completions = sample_completions(
            shared,
            policy,
            prompts,
            journal,
            count=1,
            sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=limit),
            seed=settings.seed,
        )
        session = JudgeSession.of(context, shared, settings.judge, journal)
        critic = session.open_judge_or(policy)
        drafts = [
            Draft(str(index), prompt, completion)
            for index, (prompt, (completion,)) in enumerate(zip(prompts, completions, strict=True))
            if completion.text
        ]
        for number in range(1, settings.revisions + 1):
            _run_round(number, drafts, settings, session, critic)
    if not context.worker.is_main:
        return StageOutcome()
    revised = [draft for draft in drafts if draft.rounds]
    _write(context.workdir, drafts, session.judge, as_messages=policy.has_chat_template)
    if not revised:
        raise _no_revisions(len(prompts), session)
    return StageOutcome(
        _metrics(len(prompts), drafts, revised, session),
        details={"critic": session.judge, "problems": session.tally.problems},
        contents=(REVISIONS,),
    )


# ---- rounds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One critique and the revision that follows it."""

    principle: str
    critique: str
    revision: str


@dataclass
class Draft:
    """A completion and its revisions so far."""

    key: str
    prompt: TokenizedPrompt
    completion: Completion
    rounds: list[Round] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The last revision, or the completion if there is none."""
        return self.rounds[-1].revision if self.rounds else self.completion.text

    def principle(self, number: int, settings: CritiqueSettings) -> str:
        """Return the principle of a round, drawn by the stage's seed."""
        generator = random.Random(f"{settings.seed}/{self.key}/{number}")
        return generator.choice(settings.principles)


def _run_round(
    number: int,
    drafts: Sequence[Draft],
    settings: CritiqueSettings,
    session: JudgeSession,
    critic: Judge,
) -> None:
    """Request all critiques, then all revisions. A draft without a reply keeps its last revision
    and takes no part in later rounds."""
    current = [draft for draft in drafts if len(draft.rounds) == number - 1]
    critiques = [_critique_prompt(draft, number, settings) for draft in current]
    session.request(critic, critiques, f"requesting critiques, round {number}")
    criticized = [
        (draft, prompt, session.replies[prompt.key].text.strip())
        for draft, prompt in zip(current, critiques, strict=True)
        if prompt.key in session.replies
    ]
    revisions = [
        _revision_prompt(draft, number, settings, prompt, critique)
        for draft, prompt, critique in criticized
    ]
    session.request(critic, revisions, f"requesting revisions, round {number}")
    for (draft, _, critique), revision in zip(criticized, revisions, strict=True):
        reply = session.replies.get(revision.key)
        if reply is not None:
            principle = draft.principle(number, settings)
            draft.rounds.append(Round(principle, critique, reply.text.strip()))


def _critique_prompt(draft: Draft, number: int, settings: CritiqueSettings) -> JudgePrompt:
    principle = draft.principle(number, settings)
    messages = (
        *draft.prompt.prompt.messages,
        turn("assistant", draft.text),
        turn("user", fill_template(settings.critique_request, principle=principle)),
    )
    key = f"{draft.key}/critique-{number}"
    return JudgePrompt(key, messages, settings.max_new_tokens, wants_label=False)


def _revision_prompt(
    draft: Draft, number: int, settings: CritiqueSettings, prompt: JudgePrompt, critique: str
) -> JudgePrompt:
    """Return the prompt that continues a critique's prompt and its reply."""
    principle = draft.principle(number, settings)
    messages = (
        *prompt.messages,
        turn("assistant", critique),
        turn("user", fill_template(settings.revision_request, principle=principle)),
    )
    key = f"{draft.key}/revision-{number}"
    return JudgePrompt(key, messages, settings.max_new_tokens, wants_label=False)


# ---- results ------------------------------------------------------------------------------------


def _write(workdir: Path, drafts: Sequence[Draft], critic: str, *, as_messages: bool) -> None:
    """Write `revisions.jsonl` and `critiques.jsonl`. `as_messages`: write revisions as lists of
    messages, not as plain text, which the policy continues without a chat template."""
    revisions = (_row(draft, critic, as_messages) for draft in drafts if draft.rounds)
    write_atomically(workdir / REVISIONS, lines(revisions))
    critiques = (
        {
            "prompt": draft.prompt.prompt.where,
            "question": draft.prompt.prompt.question,
            "completion": draft.completion.text,
            "rounds": [vars(one) for one in draft.rounds],
        }
        for draft in drafts
    )
    write_atomically(workdir / CRITIQUES, lines(critiques))


def _row(draft: Draft, critic: str, as_messages: bool) -> dict[str, Any]:
    prompt = draft.prompt.prompt
    provenance = {"critic": critic, "principles": [one.principle for one in draft.rounds]}
    if not as_messages:
        return {
            "prompt": transcript(prompt.messages),
            "completion": draft.text,
            "provenance": provenance,
        }
    messages = [*prompt.messages, turn("assistant", draft.text)]
    return {"messages": messages, "provenance": provenance}


def _metrics(
    prompts: int, drafts: Sequence[Draft], revised: Sequence[Draft], session: JudgeSession
) -> dict[str, float]:
    truncated = sum(not draft.completion.complete for draft in drafts)
    return {
        "prompts": float(prompts),
        "emptyCompletions": float(prompts - len(drafts)),
        "truncatedCompletions": truncated / len(drafts),
        "revisions": float(len(revised)),
        "unrevised": float(len(drafts) - len(revised)),
        "unchanged": float(sum(draft.text == draft.completion.text for draft in revised)),
        "roundsPerRevision": sum(len(draft.rounds) for draft in revised) / len(revised),
        **session.metrics(),
    }


def _no_revisions(prompts: int, session: JudgeSession) -> StageError:
    if session.budget.exhausted:
        return session.budget_spent(f"any completion of {prompts} prompts was revised")
    return StageError(
        "NoRevisions",
        f"none of {prompts} prompts has a completion that could be revised.",
        advice="Choose another model.uri, or other constitution.prompts.",
    )
