"""The parts of one evaluation, from the stage's settings and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tuneyard.api.stage_settings import (
    ChatSettings,
    CompletionsSettings,
    EvaluateSettings,
    scoring_terms,
)
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, read_prompts
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation import reward
from tuneyard_trainer.evaluation.held_out import HeldOut
from tuneyard_trainer.evaluation.part import Part, Rater
from tuneyard_trainer.evaluation.preferences import HeldOutPreferences, ImplicitRewards
from tuneyard_trainer.evaluation.sampled import SampledCompletions, usable_prompts
from tuneyard_trainer.evaluation.suites.kept import kept
from tuneyard_trainer.evaluation.suites.parts import suites
from tuneyard_trainer.evaluation.suites.tasks import require_known
from tuneyard_trainer.evaluation.sycophancy import Sycophancy
from tuneyard_trainer.evaluation.win_rate import WinRate
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.worker import StageContext


def parts_of(context: StageContext, shared: SharedStage) -> list[Part[Any]]:
    """Return the parts that the stage has settings and inputs for, in the order in which they
    measure. Raises StageError if the data, or a reward, cannot be used."""
    settings = context.settings(EvaluateSettings)
    chat = settings.chat or ChatSettings(system_prompt=None, chat_template=None)
    pairs = context.inputs.get("pairs")
    held_out = HeldOutPreferences.open(pairs, chat) if pairs else None
    parts: list[Part[Any]] = []
    if "tuned" in context.inputs:
        parts += _of_policies(context, shared, settings, chat, held_out)
    learned = [term for term in settings.reward or () if term.role]
    if learned and held_out and not held_out.labeled:
        parts.append(reward.RewardOfPreferences(context, shared, learned, chat, held_out))
    return parts


def _of_policies(
    context: StageContext,
    shared: SharedStage,
    settings: EvaluateSettings,
    chat: ChatSettings,
    held_out: HeldOutPreferences | None,
) -> Iterator[Part[Any]]:
    """Yield the parts that measure models which write. A win rate compares what they sample; if
    they sample nothing, their answers to held-out questions."""
    judges = _judges(context, shared, settings)
    sampled = settings.completions
    if "data" in context.inputs:
        yield HeldOut.of(context, [] if sampled else judges)
    tokenizer = load_tokenizer(context.inputs["model"])
    if chat.chat_template is not None:
        tokenizer.chat_template = chat.chat_template
    if sampled:
        is_held_out, prompts = _prompts(context, shared, sampled, tokenizer, chat, held_out)
        rewards = _rewards(context, shared, settings, chat, prompts) if prompts else ()
        yield SampledCompletions(
            tokenizer=tokenizer,
            chat_template=chat.chat_template,
            sampling=sampled.sampling,
            seed=settings.seed or 0,
            prompts=prompts,
            held_out=is_held_out,
            samples=settings.samples,
            raters=[*rewards, *judges],
        )
        yield Sycophancy(tokenizer, chat.chat_template)
    if settings.suites:
        planned = settings.suites
        shared.from_main(lambda: require_known(planned))
        own = _tokenizer_of_rows(context) or tokenizer
        found = suites(context, settings.suites, own, chat)
        yield from kept(context, shared, found, own.chat_template)
    if held_out and settings.preferences:
        pad = int(tokenizer.pad_token_id)
        yield ImplicitRewards(held_out, settings.preferences.beta, pad)


def _tokenizer_of_rows(context: StageContext) -> Any | None:
    """Return the tokenizer of the prepared rows, whose chat template may be the manifest's. None:
    there are no rows."""
    data = context.inputs.get("data")
    return load_tokenizer(data / "tokenizer") if data else None


def _rewards(
    context: StageContext,
    shared: SharedStage,
    settings: EvaluateSettings,
    chat: ChatSettings,
    prompts: Sequence[TokenizedPrompt],
) -> Sequence[Rater]:
    """Return the optimized reward and the independent one, as far as the job has them."""
    asked = [prompt.prompt for prompt in prompts]
    raters: list[Rater] = []
    if settings.reward:
        loaded = reward.load(context, shared, settings.reward, chat, asked)
        raters.append(reward.RewardOfCompletions(shared, loaded))
    if term := settings.independent_reward:
        independent = reward.load_independent(context, shared, term, chat, asked)
        raters.append(reward.RewardOfCompletions(shared, independent, "independentReward"))
    return raters


def _judges(
    context: StageContext, shared: SharedStage, settings: EvaluateSettings
) -> Sequence[Rater]:
    """Return the judge of the win rate, if there is one."""
    if settings.win_rate is None:
        return ()
    return [WinRate(context, shared, settings.win_rate, settings.seed or 0)]


def _prompts(
    context: StageContext,
    shared: SharedStage,
    settings: CompletionsSettings,
    tokenizer: Any,
    chat: ChatSettings,
    held_out: HeldOutPreferences | None,
) -> tuple[bool, list[TokenizedPrompt]]:
    """Return whether the models complete held-out prompts, and the prompts, which rank 0 reads.

    They complete the prompts of the training if no prompts are held out, or if a rule of the reward
    needs fields of these rows.
    """
    path = context.inputs.get("prompts")
    has_rule = any(term.rule for term in scoring_terms(context.settings(EvaluateSettings)))
    known = held_out.prompts if held_out else []

    def usable(prompts: Sequence[Prompt]) -> list[TokenizedPrompt]:
        return usable_prompts(prompts, tokenizer, chat, settings.sampling.max_new_tokens)

    if settings.prompts is None or path is None or (known and not has_rule):
        return True, shared.from_main(lambda: usable(known))
    of_training = settings.prompts
    return False, shared.from_main(
        lambda: usable(read_prompts(path, of_training, chat, name="the prompts"))
    )
