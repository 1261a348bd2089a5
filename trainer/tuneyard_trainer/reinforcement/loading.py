"""Loading of the parts of a reinforcement run: prompts, reward, policy and sampling engine."""

from __future__ import annotations

from collections.abc import Sequence

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.generation.completions import Policy
from tuneyard_trainer.generation.sampling import Sampler, TransformersSampler, stop_tokens
from tuneyard_trainer.models import policies
from tuneyard_trainer.reinforcement import actor as actors
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.actor import Actor
from tuneyard_trainer.reinforcement.independent import IndependentReward
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector, ProcessGroup, untokenized
from tuneyard_trainer.worker import StageContext, Worker


def load_collector(
    context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
) -> tuple[Collector, list[TokenizedPrompt]]:
    """Return the collector of completions, with the policy in training, and all prompts.

    Prompts and reward are checked before the policy is loaded. Raises StageError.
    """
    worker, sampling = context.worker, settings.sampling
    name = f"spec.optimize.{context.stage.name.partition('-')[0]}.prompts"
    policy = Policy.of(context.inputs, settings.chat, worker)
    prompts = policy.prompts(settings.prompts, sampling.max_new_tokens, name)
    reward = rewards.load(
        settings.reward, context.inputs, settings.chat, untokenized(prompts), worker.device
    )
    independent = None
    if settings.independent_reward is not None:
        independent = IndependentReward.load(
            settings.independent_reward,
            context.inputs,
            settings.chat,
            untokenized(prompts),
            worker.device,
        )
    training = settings.training
    shards = policies.shards(
        context, policies.bytes_per_parameter(training, settings.adapter, worker)
    )
    worker.report(message="loading the model")
    actor = actors.load(
        context.inputs,
        settings.adapter,
        training,
        context.stage.runtime,
        worker,
        temperature=sampling.temperature,
        with_values=method.with_values,
        with_reference=method.with_reference,
        shards=shards,
    )
    stop = stop_tokens(actor.model, policy.tokenizer, settings.chat.chat_template)
    sampler = _sampler(actor, stop, sampling, prompts, worker)
    group = ProcessGroup(worker.rank, worker.world_size, worker.device)
    collector = Collector(
        actor, sampler, reward, policy.tokenizer, stop, sampling, group, independent
    )
    return collector, prompts


def _sampler(
    actor: Actor,
    stop: tuple[int, ...],
    sampling: Sampling,
    prompts: Sequence[TokenizedPrompt],
    worker: Worker,
) -> Sampler:
    """Return the job's sampling engine over the policy in training."""
    if sampling.engine == "transformers":
        return TransformersSampler(actor.model, actor.pad, stop, sampling, actor.precision)
    from tuneyard_trainer.generation.vllm import VllmSampler  # an extra

    worker.report(message="starting vLLM")
    return VllmSampler.of(
        actor.model,
        stop,
        sampling,
        precision=actor.precision,
        longest=max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens,
        workers=worker.world_size,
    )
