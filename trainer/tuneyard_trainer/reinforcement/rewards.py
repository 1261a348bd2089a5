"""What an answer is worth: a reward model, a rule, or a weighted sum of them.

A reward that is no number ends the stage with the prompt's name; nothing is ever scored 0 because
it could not be scored. Shapes: N answers, L tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jsonschema
import referencing
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tuneyard.api.alignment import RuleReward
from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import ChatFormat, MisfitError, rendered
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.generation.batches import length_batches
from tuneyard_trainer.models import base, reward_models
from tuneyard_trainer.models.files import context_length, first_line

BATCH_ANSWERS = 64
"""Answers that a reward model reads at once; it keeps no cache."""


class Attempt(NamedTuple):
    """An answer to a prompt."""

    prompt: Prompt
    answer: str
    """As text, without the token that ended it."""


class Reward(Protocol):
    """Scores answers; higher is better. May give what is no number: `finite` is who objects."""

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        """(N,) in float32, on the CPU."""
        ...


def load(
    terms: Sequence[RewardTerm],
    inputs: Mapping[str, Path],
    chat: ChatSettings,
    prompts: Sequence[Prompt],
    device: torch.device,
) -> Reward:
    """The sum of the terms. Everything that can be wrong with a rule or a model is found here,
    before anything is sampled: raises StageError. `prompts`: all that will be answered."""
    parts = [(term.weight, _term(term, inputs, chat, prompts, device)) for term in terms]
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return Mixture(tuple(parts))


def _term(
    term: RewardTerm,
    inputs: Mapping[str, Path],
    chat: ChatSettings,
    prompts: Sequence[Prompt],
    device: torch.device,
) -> Reward:
    if term.role is not None:
        return LearnedReward.load(inputs[term.role], chat, device)
    rule = term.rule or RuleReward()
    if rule.exact_match is not None:
        return ExactMatch.checked(rule.exact_match, prompts)
    if rule.json_schema is not None:
        return JsonSchema.parsed(rule.json_schema)
    raise TypeError(f"neither a model nor a rule: {term!r}")


def finite(scores_N: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The scores, if all of them are numbers. Raises StageError NonFiniteReward."""
    broken = (~scores_N.isfinite()).nonzero().flatten().tolist()
    if not broken:
        return scores_N
    first = broken[0]
    raise StageError(
        "NonFiniteReward",
        f"the reward of {len(broken)} of {len(scores_N)} answers is no number: "
        f"{scores_N[first].item()} for the answer to prompt {prompts[first].where}.",
        advice="Look at that prompt; if it is sound, the reward model is broken: train it again at "
        "a lower rewardModel.train.training.learningRate, or choose another rewardModel.",
    )


# ---- sums and rules -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A weighted sum."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.stack([weight * reward(attempts) for weight, reward in self.parts]).sum(0)


@dataclass(frozen=True)
class ExactMatch:
    """1 where the answer equals the prompt row's field (any of them, where it is a list), white
    space and case aside; else 0."""

    field: str

    @classmethod
    def checked(cls, field: str, prompts: Sequence[Prompt]) -> ExactMatch:
        """Raises StageError RewardFieldMissing where a row has no such field."""
        missing = [prompt for prompt in prompts if not _wanted(prompt.row.get(field))]
        if missing:
            raise StageError(
                "RewardFieldMissing",
                f"{len(missing)} of {len(prompts)} prompts have no field {field!r} to compare an "
                f"answer with: {missing[0].where} has {', '.join(missing[0].row) or 'no fields'}.",
                advice="Set rewardModel.rule.exactMatch to a field that every row has.",
            )
        return cls(field)

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.tensor(
            [
                float(_plain(answer) in _wanted(prompt.row[self.field]))
                for prompt, answer in attempts
            ]
        )


def _wanted(value: Any) -> frozenset[str]:
    """What counts as equal; empty where there is nothing to be equal to."""
    values = value if isinstance(value, list) else [value]
    return frozenset(_plain(str(one)) for one in values if isinstance(one, str | int | float))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class JsonSchema:
    """1 where the whole answer is JSON that the schema accepts; else 0."""

    validator: Any

    @classmethod
    def parsed(cls, text: str) -> JsonSchema:
        """Raises StageError BadSchema."""
        try:
            schema = json.loads(text)
            kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
            kind.check_schema(schema)
        except (ValueError, RecursionError, jsonschema.SchemaError) as error:
            raise StageError(
                "BadSchema",
                f"rewardModel.rule.jsonSchema is no JSON Schema: {first_line(error)}.",
                advice="Repair rewardModel.rule.jsonSchema.",
            ) from error
        # An empty registry: a schema's "$ref" must never make this machine fetch anything.
        return cls(kind(schema, registry=referencing.Registry()))

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.tensor([float(self._accepts(attempt.answer)) for attempt in attempts])

    def _accepts(self, answer: str) -> bool:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(self.validator.is_valid(value))
        except referencing.exceptions.Unresolvable as error:
            raise StageError(
                "BadSchema",
                f"rewardModel.rule.jsonSchema refers to what it does not hold: {error}.",
                advice='Put what it refers to into the schema, under "$defs".',
            ) from error


# ---- reward models ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedReward:
    """A sequence classifier with one output, reading conversations through its own tokenizer and
    template, so that it may be of another family than the policy."""

    model: Any
    pad: int
    encode: Callable[[Attempt], list[int]]
    """The conversation as it was trained to read it."""
    max_length: int | None
    """The most tokens that its positions allow; None: no limit is known."""

    @classmethod
    def load(cls, path: Path, chat: ChatSettings, device: torch.device) -> LearnedReward:
        """A reward stage's output, or a folder with a classifier. Raises StageError."""
        ours = (path / "weights").is_dir()
        folder, beside = (path / "weights", path / "tokenizer") if ours else (path, path)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = reward_models.load(folder, dtype=dtype, device=device)
        tokenizer = base.load_tokenizer(beside)
        _check_vocabulary(path, model, tokenizer)
        if ours and chat.chat_template:
            tokenizer.chat_template = chat.chat_template
        encode = _in_turns(tokenizer) if tokenizer.chat_template else _plainly(tokenizer, ours)
        return cls(model, int(tokenizer.pad_token_id), encode, context_length(model.config))

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        if not attempts:
            return torch.zeros(0)
        encoded = [self.encode(attempt) for attempt in attempts]
        self._check_lengths(attempts, encoded)
        scores_N = torch.zeros(len(attempts))
        for chosen in length_batches([len(ids) for ids in encoded], BATCH_ANSWERS, padded=True):
            scores_N[torch.tensor(chosen)] = self._scored([encoded[i] for i in chosen])
        return scores_N

    @torch.no_grad()
    def _scored(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        lengths_N = torch.tensor([len(row) for row in rows], device=device)
        ids_NL = torch.full((len(rows), max(map(len, rows))), self.pad)
        for index, row in enumerate(rows):
            ids_NL[index, : len(row)] = torch.tensor(row)
        ids_NL = ids_NL.to(device)
        seen_NL = (torch.arange(ids_NL.shape[1], device=device) < lengths_N[:, None]).long()
        return self._pooled(ids_NL, seen_NL, lengths_N - 1).float().cpu()

    def _pooled(self, ids_NL: Tensor, seen_NL: Tensor, last_N: Tensor) -> Tensor:
        """(N,) scores. A decoder scores the last token: transformers takes the last one that is not
        padding by its id, which is one too early where padding is the stop token."""
        if not hasattr(self.model, "score"):
            return self.model(input_ids=ids_NL, attention_mask=seen_NL).logits[:, 0]
        trunk = getattr(self.model, self.model.base_model_prefix)
        hidden_NLH = trunk(input_ids=ids_NL, attention_mask=seen_NL, use_cache=False)[0]
        rows_N = torch.arange(len(last_N), device=last_N.device)
        return self.model.score(hidden_NLH[rows_N, last_N])[:, 0]

    def _check_lengths(self, attempts: Sequence[Attempt], encoded: Sequence[Sequence[int]]) -> None:
        for attempt, ids in zip(attempts, encoded, strict=True):
            if self.max_length is not None and len(ids) > self.max_length:
                raise StageError(
                    "RewardContextTooShort",
                    f"the answer to prompt {attempt.prompt.where} takes {len(ids)} tokens with its "
                    f"prompt, and the reward model reads {self.max_length}.",
                    advice="Lower sampling.maxNewTokens, shorten the prompts, or choose a reward "
                    "model with a longer context.",
                )


def _check_vocabulary(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= known:
        raise StageError(
            "RewardTokenizerMismatch",
            f"the tokenizer in {path} has the token {highest}, and the reward model beside it "
            f"knows {known}: it was trained with another one.",
            advice="Set rewardModel.model.uri to a model with its own tokenizer.",
        )


def _in_turns(tokenizer: PreTrainedTokenizerBase) -> Callable[[Attempt], list[int]]:
    """Prompt, answer and the token that ends it, by the chat template. Every answer is scored as if
    it had ended: what was cut off pays the missing-end penalty."""
    stop = ChatFormat.of(tokenizer).stop

    def encode(attempt: Attempt) -> list[int]:
        try:
            text = rendered(tokenizer, attempt.prompt.messages) + attempt.answer + stop
        except MisfitError as error:
            raise StageError(
                "RewardTokenizerMismatch",
                f"the reward model's chat template refuses prompt {attempt.prompt.where}: {error}.",
                advice="Choose a reward model of the policy's family, or leave such prompts out.",
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


def _plainly(tokenizer: PreTrainedTokenizerBase, ours: bool) -> Callable[[Attempt], list[int]]:
    """For a tokenizer without a chat template. `ours`: as `tokenization` encodes prompt and
    completion; else one text, as classifiers are trained to read it."""

    def encode(attempt: Attempt) -> list[int]:
        *before, last = attempt.prompt.messages
        if any(turn["role"] != "system" for turn in before):
            raise StageError(
                "RewardTokenizerMismatch",
                "the reward model's tokenizer has no chat template, and prompt "
                f"{attempt.prompt.where} is a conversation of {len(before) + 1} turns.",
                advice="Choose a reward model with a chat template.",
            )
        if not ours:
            return list(tokenizer(last["content"] + attempt.answer)["input_ids"])
        prompt = tokenizer(last["content"])["input_ids"]
        answer = tokenizer(attempt.answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *answer, tokenizer.eos_token_id]

    return encode
