"""critique: constitutional AI's supervised half (Bai et al. 2022, arXiv:2212.08073, section 3).

The policy answers each prompt; the critic, which is the policy itself or a judge, criticises the
answer by a principle and writes it anew, several rounds over. The last revisions are left as
`revisions.jsonl`, rows for `prepare`; `critiques.jsonl` tells how they came about. Answers and
replies go into a journal as they come: a stage that was killed asks nothing twice.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneyard.api.alignment import Sampling
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import CritiqueSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import Message
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.generation.completions import Completion, Policy, sample_completions
from tuneyard_trainer.judging.judges import Ask, Judge, filled
from tuneyard_trainer.judging.local_model import ModelJudge
from tuneyard_trainer.judging.session import Asking
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.journal import Journal, lines
from tuneyard_trainer.worker import StageContext, StageOutcome

REVISIONS, CRITIQUES = "revisions.jsonl", "critiques.jsonl"
ANSWER_TEMPERATURE = 1.0
"""The first answers shall show what the policy does by itself, faults included."""


def run(context: StageContext) -> StageOutcome:
    """Answers, criticises, revises. Raises StageError NoRevisions, BudgetSpent and what judges
    raise."""
    settings = context.settings(CritiqueSettings)
    policy = Policy.of(context.inputs, settings.chat, context.worker)
    limit = settings.max_new_tokens
    prompts = policy.prompts(settings.prompts, limit, "constitution.prompts")
    with Journal(
        context.workdir / "checkpoints", context.worker.identity, context.worker.persist
    ) as journal:
        found = sample_completions(
            context.stage.name,
            policy,
            prompts,
            journal,
            count=1,
            sampling=Sampling(temperature=ANSWER_TEMPERATURE, max_new_tokens=limit),
            seed=settings.seed,
        )
        asking = Asking.of(context.stage, settings.judge, journal, context.worker)
        critic = _critic(context.stage, context.inputs, policy, asking)
        drafts = [
            Draft(str(index), ready, group[0])
            for index, (ready, group) in enumerate(zip(prompts, found, strict=True))
            if group[0].text
        ]
        for number in range(1, settings.revisions + 1):
            _round(number, drafts, settings, asking, critic)
    revised = [draft for draft in drafts if draft.rounds]
    _write(context.workdir, drafts, revised, asking.tally.judge, speaks=policy.has_chat_template)
    if not revised:
        raise _no_revisions(len(prompts), asking)
    return StageOutcome(
        _metrics(len(prompts), drafts, revised, asking),
        details={"critic": asking.tally.judge, "problems": asking.tally.shown},
        contents=(REVISIONS,),
    )


def _critic(
    stage: PlannedStage, inputs: Mapping[str, Path], policy: Policy, asking: Asking
) -> Judge:
    if "judge" in inputs or stage.runtime.endpoint is not None:
        policy.release()
        return asking.open(stage, inputs)
    return ModelJudge(
        policy.model,
        policy.tokenizer,
        asking.tally.judge,
        stop=policy.worker.stop,
        template=policy.chat.chat_template,
    )


# ---- rounds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One critique and what was made of it."""

    principle: str
    critique: str
    revision: str


@dataclass
class Draft:
    """A prompt's answer on its way."""

    key: str
    ready: TokenizedPrompt
    answer: Completion
    rounds: list[Round] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer as it stands."""
        return self.rounds[-1].revision if self.rounds else self.answer.text

    def principle(self, number: int, settings: CritiqueSettings) -> str:
        """The one drawn for a round."""
        drawn = random.Random(f"{settings.seed}/{self.key}/{number}")
        return drawn.choice(settings.principles)


def _round(
    number: int,
    drafts: Sequence[Draft],
    settings: CritiqueSettings,
    asking: Asking,
    critic: Judge,
) -> None:
    """All critiques, then all revisions. Who falls out of a round stays out: what it has by then is
    its result."""
    going = [draft for draft in drafts if len(draft.rounds) == number - 1]
    asks = {draft.key: _critique_ask(draft, number, settings) for draft in going}
    asking.ask(critic, list(asks.values()), f"criticising, round {number}")
    criticised = [draft for draft in going if asks[draft.key].key in asking.known]
    revisions = {
        draft.key: _revision_ask(
            draft, number, settings, asks[draft.key], asking.known[asks[draft.key].key].text
        )
        for draft in criticised
    }
    asking.ask(critic, list(revisions.values()), f"revising, round {number}")
    for draft in criticised:
        reply = asking.known.get(revisions[draft.key].key)
        if reply is not None:
            critique = asking.known[asks[draft.key].key].text
            draft.rounds.append(
                Round(draft.principle(number, settings), critique.strip(), reply.text.strip())
            )


def _critique_ask(draft: Draft, number: int, settings: CritiqueSettings) -> Ask:
    request = filled(settings.critique_request, principle=draft.principle(number, settings))
    messages = (
        *draft.ready.prompt.messages,
        _turn("assistant", draft.text),
        _turn("user", request),
    )
    return Ask(f"{draft.key}/critique-{number}", messages, settings.max_new_tokens, False)


def _revision_ask(
    draft: Draft, number: int, settings: CritiqueSettings, asked: Ask, critique: str
) -> Ask:
    request = filled(settings.revision_request, principle=draft.principle(number, settings))
    messages = (*asked.messages, _turn("assistant", critique.strip()), _turn("user", request))
    return Ask(f"{draft.key}/revision-{number}", messages, settings.max_new_tokens, False)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---- results ------------------------------------------------------------------------------------


def _write(
    workdir: Path,
    drafts: Sequence[Draft],
    revised: Sequence[Draft],
    critic: str,
    *,
    speaks: bool,
) -> None:
    write_atomically(workdir / REVISIONS, lines(_row(draft, critic, speaks) for draft in revised))
    write_atomically(
        workdir / CRITIQUES,
        lines(
            {
                "prompt": draft.ready.prompt.where,
                "question": draft.ready.prompt.question,
                "answer": draft.answer.text,
                "rounds": [vars(one) for one in draft.rounds],
            }
            for draft in drafts
        ),
    )


def _row(draft: Draft, critic: str, speaks: bool) -> dict[str, Any]:
    """`speaks`: whether the policy reads conversations; else the row is plain text."""
    prompt = draft.ready.prompt
    provenance = {"critic": critic, "principles": [one.principle for one in draft.rounds]}
    if not speaks:
        return {"prompt": prompt.question, "completion": draft.text, "provenance": provenance}
    messages = [*prompt.messages, _turn("assistant", draft.text)]
    return {"messages": messages, "provenance": provenance}


def _metrics(
    prompts: int, drafts: Sequence[Draft], revised: Sequence[Draft], asking: Asking
) -> dict[str, float]:
    return {
        "prompts": float(prompts),
        "emptyAnswers": float(prompts - len(drafts)),
        "truncatedCompletions": sum(not draft.answer.complete for draft in drafts) / len(drafts),
        "revisions": float(len(revised)),
        "unrevised": float(len(drafts) - len(revised)),
        "unchanged": float(sum(draft.text == draft.answer.text for draft in revised)),
        "roundsPerRevision": sum(len(draft.rounds) for draft in revised) / len(revised),
        "budgetSpent": float(asking.budget.refused),
        **asking.tally.metrics(),
    }


def _no_revisions(prompts: int, asking: Asking) -> StageError:
    if asking.budget.refused:
        return StageError(
            "BudgetSpent",
            f"the critic's budget was spent before the answer to one of {prompts} prompts was "
            "revised.",
            advice="Raise judge.endpoint.maxRequests or maxTokens.",
        )
    return StageError(
        "NoRevisions",
        f"the model answered none of {prompts} prompts with anything that could be revised.",
        advice="Choose another model.uri, or other constitution.prompts.",
    )
