"""Rewards of completions: a reward model, a rule, or a weighted sum of them.

A reward that is not finite ends the stage with an error that names the prompt; a completion that
cannot be scored is never scored 0. Shapes: N completions, L tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jsonschema
import referencing
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tuneyard.api.alignment import RuleReward
from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import ChatFormat, rendered, transcript
from tuneyard_trainer.data.encoding.template_style import MisfitError
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.reading.conversations import Message
from tuneyard_trainer.generation.batches import length_batches
from tuneyard_trainer.models import base, reward_models
from tuneyard_trainer.models.files import context_length, first_line
from tuneyard_trainer.reinforcement.patterns import Pattern

BATCH_SIZE = 64
"""Completions in one forward pass of a reward model, which needs no key-value cache."""


class Attempt(NamedTuple):
    """A completion with its prompt."""

    prompt: Prompt
    completion: str
    """As text, without the stop token."""


class WrittenAttempt(Attempt):
    """A completion of a data set: a turn that may have reasoning and calls, which the chat template
    renders as in the rows that a reward model is trained on. A sampled completion is its text."""

    turn: Message

    def __new__(cls, prompt: Prompt, completion: str, turn: Message) -> Self:
        attempt = super().__new__(cls, prompt, completion)
        attempt.turn = turn
        return attempt


class Reward(Protocol):
    """Scores completions; higher is better. Scores need not be finite: `finite` checks."""

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        """Return the scores (N,) in float32, on the CPU."""
        ...


def load(
    terms: Sequence[RewardTerm],
    inputs: Mapping[str, Path],
    chat: ChatSettings,
    prompts: Sequence[Prompt],
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> Reward:
    """Return the weighted sum of the terms.

    Checks rules and models before anything is sampled: raises StageError if one is invalid.
    `prompts`: all prompts that completions are sampled for. `before_batch`: called before each
    batch of a reward model; what it raises ends the scoring.
    """
    parts = [
        (term.weight, _term(term, inputs, chat, prompts, device, before_batch)) for term in terms
    ]
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return WeightedSum(tuple(parts))


def _term(
    term: RewardTerm,
    inputs: Mapping[str, Path],
    chat: ChatSettings,
    prompts: Sequence[Prompt],
    device: torch.device,
    before_batch: Callable[[], None],
) -> Reward:
    if term.role is not None:
        return LearnedReward.load(inputs[term.role], chat, device, before_batch)
    rule = term.rule or RuleReward()
    if rule.exact_match is not None:
        return ExactMatch.checked(rule.exact_match, prompts)
    if rule.json_schema is not None:
        return JsonSchema.parsed(rule.json_schema)
    raise TypeError(f"neither a model nor a rule: {term!r}")


def finite(scores_N: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the scores. Raises StageError NonFiniteReward if any is NaN or infinite."""
    broken = (~scores_N.isfinite()).nonzero().flatten().tolist()
    if not broken:
        return scores_N
    first = broken[0]
    raise StageError(
        "NonFiniteReward",
        f"the reward of {len(broken)} of {len(scores_N)} completions is not finite: "
        f"{scores_N[first].item()} for the completion of prompt {prompts[first].where}.",
        advice="Check that prompt. If it is valid, the reward model is broken: train it again at "
        "a lower rewardModel.train.training.learningRate, or choose another rewardModel.",
    )


def reward_failed(error: Exception, attempts: Sequence[Attempt]) -> StageError:
    """Return the error of a reward that raised `error` on these completions."""
    rows = f"{attempts[0].prompt.where} to {attempts[-1].prompt.where}" if attempts else "none"
    return StageError(
        "RewardFailed",
        f"the reward raised {type(error).__name__} on {len(attempts)} completions (prompts "
        f"{rows}): {first_line(error)}.",
        advice="Correct rewardModel or rewardTerms, or the rows of the prompts.",
    )


# ---- sums and rules -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of rewards."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.stack([weight * reward(attempts) for weight, reward in self.parts]).sum(0)


@dataclass(frozen=True)
class ExactMatch:
    """1 if the completion equals the prompt row's field (or an item of it, if the field is a list)
    apart from white space and case; else 0."""

    field: str

    @classmethod
    def checked(cls, field: str, prompts: Sequence[Prompt]) -> ExactMatch:
        """Return the rule. Raises StageError RewardFieldMissing if a row has no such field."""
        missing = [prompt for prompt in prompts if not _accepted(prompt.row.get(field))]
        if missing:
            raise StageError(
                "RewardFieldMissing",
                f"{len(missing)} of {len(prompts)} prompts have no field {field!r} to compare a "
                f"completion with: {missing[0].where} has "
                f"{', '.join(missing[0].row) or 'no fields'}.",
                advice="Set rewardModel.rule.exactMatch to a field that every row has.",
            )
        return cls(field)

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.tensor(
            [
                float(_normalized(completion) in _accepted(prompt.row[self.field]))
                for prompt, completion in attempts
            ]
        )


def _accepted(value: Any) -> frozenset[str]:
    """Return the texts that a field's value accepts; empty if it has no text or number."""
    values = value if isinstance(value, list) else [value]
    return frozenset(_normalized(str(one)) for one in values if isinstance(one, str | int | float))


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class JsonSchema:
    """1 if the whole completion is JSON that the schema accepts; else 0."""

    validator: Any
    path: str
    """The schema's field in the manifest, for messages."""

    @classmethod
    def parsed(cls, text: str, path: str = "rewardModel.rule.jsonSchema") -> JsonSchema:
        """Parse a JSON Schema. `path`: its field in the manifest. Raises StageError BadSchema."""
        try:
            schema = json.loads(text)
            kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
            kind.check_schema(schema)
            kind = jsonschema.validators.extend(kind, {"pattern": _pattern})
        except (ValueError, RecursionError, jsonschema.SchemaError) as error:
            raise StageError(
                "BadSchema",
                f"{path} is not a valid JSON Schema: {first_line(error)}.",
                advice=f"Correct {path}.",
            ) from error
        # An empty registry: a schema's "$ref" must never fetch anything from the network.
        found = cls(kind(schema, registry=referencing.Registry()), path)
        _require_end(found)
        return found

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        return torch.tensor([float(self.accepts(attempt.completion)) for attempt in attempts])

    def accepts(self, completion: str) -> bool:
        """Return whether a whole completion is JSON that the schema accepts. Raises StageError
        BadSchema for a reference to another schema."""
        try:
            value = parsed_json(completion)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(self.validator.is_valid(value))
        except (OverflowError, RecursionError):  # of a number beyond float64, of a deep value
            return False
        except referencing.exceptions.Unresolvable as error:
            raise StageError(
                "BadSchema",
                f"{self.path} has a reference to another schema: {error}.",
                advice='Put the referenced schema into it, under "$defs".',
            ) from error


def _require_end(schema: JsonSchema) -> None:
    """Raise StageError BadSchema if a schema refers to itself whatever the value is."""
    try:
        schema.validator.is_valid(None)
    except referencing.exceptions.Unresolvable:
        return  # `accepts` names the reference, if a completion needs it
    except RecursionError as error:
        raise StageError(
            "BadSchema",
            f"{schema.path} refers to itself without end.",
            advice=f'Correct the "$ref" of {schema.path}.',
        ) from error


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    """Yield the fault of a text in which a pattern is not found. The search of jsonschema may not
    end."""
    if validator.is_type(instance, "string") and not _compiled(pattern).is_in(instance):
        yield jsonschema.ValidationError(f"{pattern} is not found")


_compiled = cache(Pattern)


def parsed_json(text: str) -> Any:
    """Return the value of JSON. Raises ValueError for other text, such as NaN and Infinity, which
    Python would read, and RecursionError for deep values."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


# ---- reward models ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedReward:
    """A sequence classifier with one output. Its tokenizer and chat template are its own, so the
    policy may belong to another model family."""

    model: Any
    pad: int
    encode: Callable[[Attempt], list[int]]
    """Returns the tokens of prompt and completion, in the format of the model's training data."""
    max_length: int | None
    """Maximum tokens by the model's positions; None: no limit is known."""
    before_batch: Callable[[], None] = lambda: None

    @classmethod
    def load(
        cls,
        path: Path,
        chat: ChatSettings,
        device: torch.device,
        before_batch: Callable[[], None] = lambda: None,
    ) -> LearnedReward:
        """Load a reward stage's output, or a folder with a classifier. Raises StageError."""
        from_stage = (path / "weights").is_dir()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        folder = path / "weights" if from_stage else path
        model = reward_models.load(folder, dtype=dtype, device=device)
        tokenizer = base.load_tokenizer(path / "tokenizer" if from_stage else path)
        _check_vocabulary(path, model, tokenizer)
        if from_stage and chat.chat_template:
            tokenizer.chat_template = chat.chat_template
        if tokenizer.chat_template:
            encode = _chat_encoder(tokenizer)
        else:
            encode = _text_encoder(tokenizer, with_stop=from_stage)
        context = context_length(model.config)
        return cls(model, int(tokenizer.pad_token_id), encode, context, before_batch)

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        if not attempts:
            return torch.zeros(0)
        encoded = [self.encode(attempt) for attempt in attempts]
        self._check_lengths(attempts, encoded)
        scores_N = torch.zeros(len(attempts))
        for chosen in length_batches([len(ids) for ids in encoded], BATCH_SIZE, padded=True):
            self.before_batch()
            scores_N[torch.tensor(chosen)] = self._score_batch([encoded[i] for i in chosen])
        return scores_N

    @torch.no_grad()
    def _score_batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        lengths_N = torch.tensor([len(row) for row in rows], device=device)
        ids_NL = torch.full((len(rows), max(map(len, rows))), self.pad)
        for index, row in enumerate(rows):
            ids_NL[index, : len(row)] = torch.tensor(row)
        ids_NL = ids_NL.to(device)
        positions_L = torch.arange(ids_NL.shape[1], device=device)
        attention_NL = (positions_L < lengths_N[:, None]).long()
        return self._last_token_scores(ids_NL, attention_NL, lengths_N - 1).float().cpu()

    def _last_token_scores(self, ids_NL: Tensor, attention_NL: Tensor, last_N: Tensor) -> Tensor:
        """Return the scores (N,): a decoder's at the last token (`last_N`), an encoder's pooled.
        transformers would take the last token whose id is not the pad token's, which is one too
        early if the pad token is the stop token."""
        if not hasattr(self.model, "score"):
            return self.model(input_ids=ids_NL, attention_mask=attention_NL).logits[:, 0]
        trunk = getattr(self.model, self.model.base_model_prefix)
        hidden_NLH = trunk(input_ids=ids_NL, attention_mask=attention_NL, use_cache=False)[0]
        rows_N = torch.arange(len(last_N), device=last_N.device)
        return self.model.score(hidden_NLH[rows_N, last_N])[:, 0]

    def _check_lengths(self, attempts: Sequence[Attempt], encoded: Sequence[Sequence[int]]) -> None:
        """Raise StageError RewardContextTooShort if a conversation exceeds `max_length`."""
        for attempt, ids in zip(attempts, encoded, strict=True):
            if self.max_length is not None and len(ids) > self.max_length:
                raise StageError(
                    "RewardContextTooShort",
                    f"prompt {attempt.prompt.where} and its completion have {len(ids)} tokens, and "
                    f"the reward model's context is {self.max_length}.",
                    advice="Lower sampling.maxNewTokens, shorten the prompts, or choose a reward "
                    "model with a longer context.",
                )


def _check_vocabulary(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StageError RewardTokenizerMismatch if the model lacks tokens of the tokenizer."""
    size = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= size:
        raise StageError(
            "RewardTokenizerMismatch",
            f"the tokenizer in {path} has the token {highest}, and the reward model beside it has "
            f"{size} tokens: it was trained with another tokenizer.",
            advice="Set rewardModel.model.uri to a model with its own tokenizer.",
        )


def _chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Attempt], list[int]]:
    """Encode prompt, completion and stop token by the chat template. Truncated completions get the
    stop token too: a truncated one is penalized by `ppo.missingEosPenalty` instead."""
    chat = ChatFormat.of(tokenizer)

    def encode(attempt: Attempt) -> list[int]:
        try:
            text = _chat_text(chat, attempt)
        except MisfitError as error:
            raise StageError(
                "RewardTokenizerMismatch",
                f"the reward model's chat template refuses prompt {attempt.prompt.where}: {error}.",
                advice="Choose a reward model of the policy's family, or leave such prompts out.",
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode


def _chat_text(chat: ChatFormat, attempt: Attempt) -> str:
    """Return prompt and completion up to the stop token. Raises MisfitError if the chat template
    refuses them."""
    prompt = attempt.prompt
    if not isinstance(attempt, WrittenAttempt):
        before = rendered(chat.tokenizer, prompt.messages, tools=prompt.tools)
        return before + attempt.completion + chat.stop
    turns = [*prompt.messages, attempt.turn]
    text, targets = chat.targets(turns, "last-assistant", tools=prompt.tools)
    return text[: targets[-1][1]] if targets else text


def _text_encoder(
    tokenizer: PreTrainedTokenizerBase, *, with_stop: bool
) -> Callable[[Attempt], list[int]]:
    """Encode prompt and completion for a tokenizer without a chat template, with the prompt as a
    transcript.

    `with_stop`: each on its own with a stop token, as `data.encoding` does for a reward stage;
    else both as one text, as other classifiers are trained.
    """

    def encode(attempt: Attempt) -> list[int]:
        text = transcript(attempt.prompt.messages)
        if not with_stop:
            return list(tokenizer(text + attempt.completion)["input_ids"])
        prompt = tokenizer(text)["input_ids"]
        completion = tokenizer(attempt.completion, add_special_tokens=False)["input_ids"]
        return [*prompt, *completion, tokenizer.eos_token_id]

    return encode
