"""Sequence classifiers: loading one from safetensors, and the probabilities of its labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuneyard.errors import StageError
from tuneyard_trainer.machine import memory_limit
from tuneyard_trainer.models.base import load_tokenizer, quiet
from tuneyard_trainer.models.files import context_length, first_line
from tuneyard_trainer.models.weight_files import stored_tensors

MAX_WINDOW = 512
"""Most tokens of a window: what classifiers of comments are trained on."""
OVERLAP = 8
"""Neighboring windows have this part of their tokens in common, an eighth."""
BATCH_TOKENS = 8192
"""Most tokens of a forward pass, padding included; a longer window is a pass of its own."""
GIB = 1 << 30


def load_classifier(
    folder: Path, reason: str, advice: str, **settings: Any
) -> tuple[PreTrainedModel, set[str]]:
    """Return a sequence classifier and the names of the tensors that its files lack. No code of the
    model is run. `settings`: arguments of `from_pretrained`. Raises StageError `reason`."""
    from_pretrained: Any = AutoModelForSequenceClassification.from_pretrained
    try:
        with quiet():
            model, info = from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # each architecture raises its own errors
        raise StageError(
            reason,
            f"{folder} cannot be loaded as a sequence classifier: {first_line(error)}.",
            advice=advice,
        ) from error
    return model, set(info["missing_keys"])


def _require_memory(folder: Path, field: str) -> None:
    """Raise StageError DoesNotFit if the weights in float32 take more than the memory of this
    machine or pod. The kernel would end the process without a message."""
    try:
        tensors = stored_tensors(folder)
    except (OSError, StageError):  # `load_classifier` reports what is wrong
        return
    size = sum(tensor.spec.cast(torch.float32).num_bytes for tensor in tensors.values())
    limit = memory_limit()
    if size > limit:
        raise StageError(
            "DoesNotFit",
            f"the classifier in {folder} takes {size / GIB:.1f} GiB in float32, and this machine "
            f"or pod has {limit / GIB:.1f} GiB of memory.",
            advice=f"Set {field}.classifier.uri to a smaller classifier, or give the workers more "
            "memory (spec.compute.memory).",
        )


class Verdict(NamedTuple):
    """The most probable of the labels that are searched for, in the window of a text where it is
    most probable."""

    label: str
    probability: float
    start: int
    end: int
    """The window's characters in the text."""


class _Window(NamedTuple):
    """A part of a text."""

    text: int
    """The number of the text."""
    ids: list[int]
    start: int
    end: int
    """Its characters in the text."""


@dataclass(frozen=True)
class Classifier:
    """A classifier with the labels that are searched for."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    """The labels that are searched for."""
    columns: tuple[int, ...]
    """The output of each of these labels."""
    independent: bool
    """Whether several labels may apply to one text (sigmoid). False: exactly one (softmax)."""
    window: int
    """Tokens of a window, the tokenizer's special tokens included."""

    @classmethod
    def load(
        cls, folder: Path, labels: Sequence[str], device: torch.device, field: str
    ) -> Classifier:
        """Load a classifier in float32 to search for these labels.

        `field`: the path of its rule in the manifest, which has `classifier` and `labels`. Raises
        StageError ClassifierBroken, UnknownLabel, or DoesNotFit if the CPU's memory cannot hold it.
        """
        advice = f"Set {field}.classifier.uri to a trained sequence classifier in safetensors."
        if device.type == "cpu":
            _require_memory(folder, field)
        settings = {"device_map": {"": device}} if device.type != "cpu" else {}
        model, missing = load_classifier(
            folder, "ClassifierBroken", advice, dtype=torch.float32, **settings
        )
        if missing:
            raise _broken(f"{folder} lacks {', '.join(sorted(missing)[:3])}", advice)
        if model.config.problem_type == "regression":
            raise _broken(f"{folder} is a regression, whose outputs are no probabilities", advice)
        tokenizer = _tokenizer(folder, model, advice)
        known = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
        columns = [index for index in sorted(known) if known[index] in labels]
        if unknown := [label for label in labels if label not in known.values()]:
            raise StageError(
                "UnknownLabel",
                f"{field}.labels names {', '.join(unknown)}, and the classifier in {folder} has "
                f"the labels {', '.join(known[index] for index in sorted(known))}.",
                advice=f"Name labels of the classifier in {field}.labels.",
            )
        outputs = model.config.num_labels or len(known)
        if columns[-1] >= outputs:
            raise _broken(f"{folder} has {outputs} outputs and a label {columns[-1]}", advice)
        one_output = outputs == 1  # as transformers' pipeline reads the outputs
        return cls(
            model.eval().requires_grad_(False),
            tokenizer,
            tuple(known[index] for index in columns),
            tuple(columns),
            one_output or model.config.problem_type == "multi_label_classification",
            window_length(model, tokenizer),
        )

    def verdicts(
        self, texts: Sequence[str], before_batch: Callable[[], None] = lambda: None
    ) -> list[Verdict]:
        """Return the verdict on each text. `before_batch`: called before each forward pass; what it
        raises ends the classification. Raises StageError ClassifierBroken for an output that is not
        finite."""
        worst: list[Verdict] = [Verdict(self.labels[0], 0.0, 0, 0)] * len(texts)
        for batch in _batches(self._windows(texts)):
            before_batch()
            for window, probabilities in zip(batch, self._probabilities(batch), strict=True):
                column = max(range(len(probabilities)), key=probabilities.__getitem__)
                if probabilities[column] > worst[window.text].probability:
                    worst[window.text] = Verdict(
                        self.labels[column], probabilities[column], window.start, window.end
                    )
        return worst

    def _windows(self, texts: Sequence[str]) -> list[_Window]:
        """Return the windows of all texts, in order."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.window,
            stride=self.window // OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            _Window(text, ids, *_span(offsets))
            for text, ids, offsets in zip(
                encoded["overflow_to_sample_mapping"],
                encoded["input_ids"],
                encoded["offset_mapping"],
                strict=True,
            )
            if ids  # a text of white space may have none
        ]

    @torch.inference_mode()
    def _probabilities(self, windows: Sequence[_Window]) -> list[list[float]]:
        """Return the probabilities of the labels that are searched for, of each window."""
        shape, device = (
            (len(windows), max(len(window.ids) for window in windows)),
            self.model.device,
        )
        ids_NL = torch.full(shape, self.model.config.pad_token_id)
        attention_NL = torch.zeros(shape, dtype=torch.long)
        for index, window in enumerate(windows):
            ids_NL[index, : len(window.ids)] = torch.tensor(window.ids)
            attention_NL[index, : len(window.ids)] = 1
        logits_NK: Tensor = self.model(
            input_ids=ids_NL.to(device), attention_mask=attention_NL.to(device)
        ).logits.float()
        if not logits_NK.isfinite().all():
            raise StageError(
                "ClassifierBroken",
                "the classifier's outputs are not finite.",
                advice="Choose another classifier, or fetch it again.",
            )
        chances_NK = logits_NK.sigmoid() if self.independent else logits_NK.softmax(dim=1)
        found: list[list[float]] = chances_NK[:, list(self.columns)].tolist()
        return found


def _tokenizer(folder: Path, model: PreTrainedModel, advice: str) -> PreTrainedTokenizerBase:
    """Return the classifier's tokenizer; the classifier's config names its padding token. Raises
    StageError ClassifierBroken."""
    try:
        tokenizer = load_tokenizer(folder)
    except StageError as error:
        raise _broken(error.message.rstrip("."), advice) from error
    if not tokenizer.is_fast:
        raise _broken(f"the tokenizer in {folder} has no tokenizer.json", advice)
    padding = model.config.pad_token_id
    if padding is None or padding < 0:  # some configs of Llama have -1
        model.config.pad_token_id = tokenizer.pad_token_id
    embeddings: Any = model.get_input_embeddings()
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= embeddings.weight.shape[0]:
        raise _broken(
            f"the tokenizer in {folder} has tokens that the model beside it lacks", advice
        )
    return tokenizer


def window_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of a window: the most that the classifier reads, or MAX_WINDOW."""
    config: Any = model.config
    limits = [MAX_WINDOW, int(min(tokenizer.model_max_length, MAX_WINDOW))]
    positions = context_length(config)
    if positions is not None:
        limits.append(positions - _reserved_positions(model))
    return min(limits)


def _reserved_positions(model: nn.Module) -> int:
    """Return the first positions that no token has: RoBERTa's are those up to its padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _span(offsets: Collection[tuple[int, int]]) -> tuple[int, int]:
    """Return the characters that tokens cover; special tokens cover none."""
    ends = [(start, end) for start, end in offsets if end > start]
    return (ends[0][0], ends[-1][1]) if ends else (0, 0)


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Yield the windows by length, the longest first, within BATCH_TOKENS."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _broken(problem: str, advice: str) -> StageError:
    return StageError("ClassifierBroken", f"{problem}.", advice=advice)
