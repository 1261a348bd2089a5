"""Tokenization of examples, and the mask of their targets.

A conversation is rendered by its chat template and tokenized once. `chat` finds the targets as
characters of that rendering, and the tokenizer's offsets map these characters to tokens. Marking
targets therefore never changes an id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import ChatFormat, Span, TrainOn
from tuneyard_trainer.data.encoding.template_style import MisfitError
from tuneyard_trainer.data.encoding.token_bytes import TokenBytes
from tuneyard_trainer.data.reading.conversations import Message, template_turns
from tuneyard_trainer.data.reading.example import Example

_TEXTS_AT_ONCE = 64
"""Texts of a call: enough for threads, and so few that what it allocates stays in a cache: in a
measurement of the tokenizer alone, 2% to 4% less time than for 256."""


@dataclass(frozen=True)
class Encoded:
    """One row as token ids with the mask of its targets."""

    ids: NDArray[np.int32]
    """(L,) token ids."""
    mask: NDArray[np.uint8]
    """(L,) 1 for a target: a token to predict from the tokens before it. mask[0] is always 0."""


@dataclass(frozen=True)
class Misfit:
    """The result for a conversation that the chat template does not support."""

    message: str


@dataclass(frozen=True)
class Encoder:
    """Encodes examples of any kind, in batches: a fast tokenizer encodes a list in parallel."""

    tokenizer: PreTrainedTokenizerBase
    train_on: TrainOn
    system_prompt: str | None = None
    """The system turn added to conversations without one. None: none is added."""
    reasoning: bool = True
    """Whether reasoning is rendered, where the chat template does. False: it is left out."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Examples whose `reasoning` or `tools` the chat template does not render."""

    def encode(self, examples: Sequence[Example]) -> list[Encoded | Misfit]:
        """Return one result for each example, in order.

        Raises StageError ChatTemplate or NoStopToken if no conversation can be encoded.
        """
        chats = {i: chat for i, e in enumerate(examples) if (chat := self.conversation(e))}
        rest = [i for i in range(len(examples)) if i not in chats]
        pairs = [i for i in rest if examples[i].kind == "completion"]
        texts = [i for i in rest if examples[i].kind == "text"]
        results: dict[int, Encoded | Misfit] = {}
        if chats:
            encoded = self._chats([examples[i] for i in chats], list(chats.values()))
            results.update(zip(chats, encoded, strict=True))
        results.update(zip(pairs, self._completions([examples[i] for i in pairs]), strict=True))
        results |= {i: _NO_CALLS for i in pairs if any(t.calls for t in examples[i].messages)}
        results.update(zip(texts, self._texts([examples[i].text for i in texts]), strict=True))
        return [results[i] for i in range(len(examples))]

    def conversation(self, example: Example) -> list[Message] | None:
        """Return the turns for the chat template. None: the example is plain text, or prompt and
        completion for a tokenizer without a chat template."""
        if example.kind == "text" or (
            example.kind == "completion" and not self.tokenizer.chat_template
        ):
            return None
        return self.turns(example)

    def turns(self, example: Example) -> list[Message]:
        """Return the example's turns, with the job's system turn if it has none of its own."""
        turns = template_turns(example.messages, reasoning=self.reasoning)
        if self.system_prompt is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    @cached_property
    def _format(self) -> ChatFormat:
        return ChatFormat.of(self.tokenizer)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer, a completion or a document."""
        found = {self.tokenizer.eos_token_id}
        if self.tokenizer.chat_template:
            found.add(self.tokenizer.convert_tokens_to_ids(self._format.stop_token))
        return frozenset(int(token) for token in found if token is not None)

    @property
    def blocks_are_wrong(self) -> bool:
        """Whether the chat template marks other text than answers as what is trained on."""
        return bool(self.tokenizer.chat_template) and self._format.blocks_are_wrong

    @cached_property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise StageError(
                "NoStopToken",
                "the tokenizer has no end-of-sequence token, so a tuned model could not stop.",
                advice="Choose a model whose tokenizer has an eos_token.",
            )
        return int(self.tokenizer.eos_token_id)

    def _chats(
        self, examples: Sequence[Example], conversations: Sequence[Sequence[Message]]
    ) -> list[Encoded | Misfit]:
        """Return one result for each conversation, in order."""
        misfits: dict[int, Misfit] = {}
        texts: list[str] = []
        spans: list[list[Span]] = []
        for index, (example, messages) in enumerate(zip(examples, conversations, strict=True)):
            added = len(messages) - len(example.messages)  # the job's system turn
            trained = [None] * added + [turn.train for turn in example.messages]
            try:
                text, targets = self._format.targets(
                    messages, self.train_on, tools=example.tools, trained=trained
                )
            except MisfitError as error:
                misfits[index] = Misfit(str(error))
            else:
                texts.append(text)
                spans.append(targets)
                self._note_left_out(example)
        encoded = iter(self._tokenized(texts, spans))
        return [misfits.get(i) or next(encoded) for i in range(len(conversations))]

    def _tokenized(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Return renderings as rows with the tokens of their spans as targets."""
        found: list[Encoded | None] = [None] * len(texts)
        if texts and self._token_bytes is not None:
            rows = [np.asarray(ids, np.int32) for ids in self._ids(texts, special=False)]
            masks = self._token_bytes.masks(texts, rows, spans)
            pairs = zip(rows, masks, strict=True)
            found = [None if mask is None else _with_mask(ids, mask) for ids, mask in pairs]
        rest = [index for index, row in enumerate(found) if row is None]
        by_offsets = iter(self._with_offsets([texts[i] for i in rest], [spans[i] for i in rest]))
        return [next(by_offsets) if row is None else row for row in found]

    def _with_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = zip(batch["input_ids"], batch.encodings or (), spans, strict=True)
        return [
            _with_mask(np.asarray(ids, np.int32), _mask_of(encoding, targets))
            for ids, encoding, targets in rows
        ]

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """The tokenizer of the library below, which returns ids alone. None: there is none."""
        if not self.tokenizer.is_fast:
            return None
        self.tokenizer("", verbose=False)  # undoes truncation and padding that its file sets
        return self.tokenizer.backend_tokenizer

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        """The bytes of the tokens. None: the tokenizer is not a byte-level one."""
        return TokenBytes.of(self.tokenizer)

    def _note_left_out(self, example: Example) -> None:
        if example.tools:
            self.left_out["tools"] += not self._format.style.tools
        if self.reasoning and any(turn.reasoning for turn in example.messages):
            self.left_out["reasoning"] += not self._format.style.reasoning

    def _completions(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encode the prompt as inference tokenizes it, the completion, and the end of sequence."""
        prompts = self._ids([example.prompt for example in examples], special=True)
        completions = self._ids([example.completion for example in examples], special=False)
        encoded = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt = prompt[:-1] if prompt[-1:] == [self._eos] else prompt
            masked = 0 if self.train_on == "all" else len(prompt)
            encoded.append(_encoded([*prompt, *completion, self._eos], masked))
        return encoded

    def _texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode documents with the tokenizer's special tokens and one end of sequence. Every token
        is a target."""
        documents = self._ids(texts, special=True)
        return [
            _encoded(ids if ids[-1:] == [self._eos] else [*ids, self._eos]) for ids in documents
        ]

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        backend = self._backend
        if backend is not None and backend.truncation is None and backend.padding is None:
            return [
                encoding.ids
                for start in range(0, len(texts), _TEXTS_AT_ONCE)
                for encoding in backend.encode_batch_fast(
                    list(texts[start : start + _TEXTS_AT_ONCE]), add_special_tokens=special
                )
            ]
        return self.tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]


_NO_CALLS = Misfit("a model without a chat template cannot call tools: set spec.data.chatTemplate")


# ---- masks ------------------------------------------------------------------------------------


def _encoded(ids: Sequence[int], masked: int = 0) -> Encoded:
    """Return the row with all tokens but the first `masked` as targets."""
    mask = np.ones(len(ids), dtype=np.uint8)
    mask[: max(1, masked)] = 0
    return Encoded(np.asarray(ids, dtype=np.int32), mask)


def _with_mask(ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> Encoded:
    mask[:1] = 0
    return Encoded(ids, mask)


def _mask_of(encoding: Encoding, spans: Sequence[Span]) -> NDArray[np.uint8]:
    """Return the mask of the tokens that hold any character of a span."""
    mask = np.zeros(len(encoding), dtype=np.uint8)
    for span in spans:
        tokens = _tokens_of(encoding, span)
        if tokens is None:
            return _mask_by_offsets(encoding.offsets, spans)
        mask[tokens[0] : tokens[1]] = 1
    return mask


def _tokens_of(encoding: Encoding, span: Span) -> tuple[int, int] | None:
    """Return the first token of a span and the end of its last one. None: the span is empty, or
    begins or ends with a character that is in no token, such as a space."""
    start, end = span
    if start >= end:
        return None
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        return None
    last += 1
    # A character may be several tokens. A token that stands for no text ends the search.
    while last < len(encoding) and (found := encoding.token_to_chars(last)) and found[0] < end:
        last += 1
    return first, last


def _mask_by_offsets(
    offsets: Sequence[tuple[int, int]], spans: Iterable[Span]
) -> NDArray[np.uint8]:
    """Return the mask of the tokens that hold any character of a span. All offsets take long.

    Byte-level tokenizers may leave a token's leading spaces out of its offsets, so that a token of
    spaces alone has an empty range at its end. The comparison below still finds such a token,
    because spans begin before their first token ends, and end with a stop token.
    """
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    begins, ends = flat[0::2], flat[1::2]
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        mask[(begins < end) & (ends > start)] = 1
    return mask
