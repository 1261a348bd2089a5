"""Chat templates: rendering, and the characters of a rendering that are targets of training.

The targets are the characters that the model itself must write: from the end of the generation
prompt (`<|im_start|>assistant\n`) to the end of the stop token. The white space that some templates
put after the stop token is no target. A template without a stop token is refused, because a model
tuned on it would never learn to stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tuneyard.errors import StageError

TrainOn = Literal["assistant", "last-assistant", "all"]
Message = dict[str, str]
"""One turn in the shape that chat templates take: {"role": ..., "content": ...}."""
_TRANSCRIPT_ROLES = {"user": "Human", "assistant": "Assistant"}
Span = tuple[int, int]
"""Start and end of a range of characters in a rendering."""

_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "TuneyardAnswerGoesHere{}."
_PLACEHOLDERS = re.compile(r"TuneyardAnswerGoesHere\d+\.")
# Templates raise these on unsupported conversations: by raise_exception, or by wrong assumptions.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


class MisfitError(Exception):
    """The chat template does not support this conversation."""


@dataclass(frozen=True)
class ChatFormat:
    """The format of an answer in a tokenizer's chat template, detected by rendering one sample."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    stop: str
    """The text after an answer, up to and with the stop token: usually the token alone."""
    stop_token: str
    prompt: str
    """The generation prompt. "": the template writes none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the format. Raises StageError ChatTemplate or NoStopToken for a template that
        training cannot use."""
        template = _template(tokenizer)
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _PLACEHOLDER.format(0)}
        try:
            sample = _render(tokenizer, template, [question, answer])
        except MisfitError as error:
            raise _unusable(f"cannot render a question and its answer: {error}.") from error
        tail = sample.partition(answer["content"])[2]
        if tail == "" and not sample.endswith(answer["content"]):
            raise _unusable("omits the assistant's answer.")
        token = _first_special(tokenizer, tail)
        if token is None:
            raise StageError(
                "NoStopToken",
                "the chat template ends an answer with no special token of the tokenizer (after "
                f"the answer comes {tail!r}), so a tuned model could not stop.",
                advice="Set spec.data.chatTemplate to a template that writes {{ eos_token }} "
                "after each answer.",
            )
        stop = tail[: tail.index(token) + len(token)]
        return cls(tokenizer, template, stop, token, _prompt(tokenizer, template, question))

    def targets(self, messages: Sequence[Message], train_on: TrainOn) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the spans of its targets, in order.

        Raises MisfitError if the template refuses the conversation or rewrites an answer.
        """
        if _BLOCKS.search(self.template) and train_on != "all":
            text, blocks = self._render_blocks(messages)
            chosen = blocks if train_on == "assistant" else blocks[-1:]
            return text, [self._with_stop(text, block) for block in chosen]
        text = _render(self.tokenizer, self.template, messages)
        if train_on == "all":
            return text, [(0, len(text))]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = turns if train_on == "assistant" else turns[-1:]
        answers = self._by_placeholder(messages, turns, text)
        if answers is None:
            answers = self._by_prompt(messages, turns, text)
        return text, [
            (self._start(messages[:turn], text, start), self._end(text, end))
            for turn, (start, end) in zip(turns, answers, strict=True)
        ]

    # ---- finding the answers --------------------------------------------------------------------

    def _render_blocks(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the rendering and its answers, found by the template's {% generation %} blocks."""
        specials: dict[str, Any] = self.tokenizer.special_tokens_map
        rendered, blocks = _guarded(
            lambda: render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **specials,
            )
        )
        return rendered[0], [(start, end) for start, end in blocks[0] if start < end]

    def _with_stop(self, text: str, block: Span) -> Span:
        """Return the block with its stop token and without white space after the token. Templates
        put the token inside the block, after the block, or inside with a newline."""
        start, end = block
        inside = text[start:end].rstrip()
        if inside.endswith(self.stop_token):
            return start, start + len(inside)
        return start, self._end(text, end)

    def _by_placeholder(
        self, messages: Sequence[Message], turns: Sequence[int], text: str
    ) -> list[Span] | None:
        """Return the answers, found by a second rendering with placeholders for the answers.

        None: the text between the answers differs from the first rendering, as with templates
        that parse the answers.
        """
        marked = [dict(message) for message in messages]
        for turn in turns:
            marked[turn]["content"] = _PLACEHOLDER.format(turn)
        pieces = _PLACEHOLDERS.split(_render(self.tokenizer, self.template, marked))
        if len(pieces) != len(turns) + 1 or not text.startswith(pieces[0]):
            return None
        spans: list[Span] = []
        position = len(pieces[0])
        for turn, piece in zip(turns, pieces[1:], strict=True):
            end = _end_of_answer(text, position, messages[turn]["content"], piece)
            if end is None:
                return None
            spans.append((position, end))
            position = end + len(piece)
        return spans if position == len(text) else None

    def _by_prompt(
        self, messages: Sequence[Message], turns: Sequence[int], text: str
    ) -> list[Span]:
        """Return the answers, found by rendering the turns before each answer with the generation
        prompt. Raises MisfitError if the answer does not follow unchanged."""
        spans: list[Span] = []
        for turn in turns:
            before = _render(self.tokenizer, self.template, messages[:turn], prompt=True)
            end = _end_of_answer(text, len(before), messages[turn]["content"], "")
            if not text.startswith(before) or end is None:
                raise MisfitError(
                    f"the chat template changes the answer in turn {turn + 1} or the text before "
                    "it; templates that strip the reasoning of earlier turns do this"
                )
            spans.append((len(before), end))
        return spans

    def _start(self, before: Sequence[Message], text: str, answer: int) -> int:
        """Return the position at which the model begins to write.

        That is the answer's start, or before it if the template puts text between the generation
        prompt and the answer (a space, an empty <think> block).
        """
        if self.prompt and text.endswith(self.prompt, 0, answer):
            return answer
        prompt = _render(self.tokenizer, self.template, before, prompt=True)
        if not text.startswith(prompt) or len(prompt) > answer:
            return answer
        # Without a generation prompt the text may be a header, which is no target.
        return len(prompt) if self.prompt or text[len(prompt) : answer].isspace() else answer

    def _end(self, text: str, answer_end: int) -> int:
        """Return the end of the stop token; the answer's end if the template writes no stop token
        after this turn."""
        if text.startswith(self.stop, answer_end):
            return answer_end + len(self.stop)
        spaced = re.compile(r"\s*" + re.escape(self.stop_token)).match(text, answer_end)
        return spaced.end() if spaced else answer_end


# ---- rendering --------------------------------------------------------------------------------


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template: str | None = None,
) -> str:
    """Return the conversation's rendering with the generation prompt.

    `template`: used instead of the tokenizer's. Raises MisfitError if the template refuses the
    conversation.
    """
    chosen = template or tokenizer.get_chat_template()
    return _render(tokenizer, chosen, messages, prompt=True)


def transcript(messages: Sequence[Message]) -> str:
    """Return a prompt for tokenizers without a chat template: a single turn as it is, several turns
    in the format of hh-rlhf, where each begins with its role and the answer follows."""
    if len(messages) == 1:
        return messages[0]["content"]
    turns = [
        f"\n\n{_TRANSCRIPT_ROLES.get(turn['role'], turn['role'].title())}: {turn['content']}"
        for turn in messages
    ]
    return "".join(turns) + "\n\nAssistant: "


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise StageError(
            "ChatTemplate",
            f"{type(tokenizer).__name__} returns no character offsets, so the tokens of the "
            "answers cannot be found.",
            advice="Choose a model with a tokenizer.json.",
        )
    if not tokenizer.chat_template:
        raise StageError(
            "ChatTemplate",
            "the data are conversations, and the model's tokenizer has no chat template: the model "
            "is a base model.",
            advice="Set spec.data.chatTemplate, choose the model's instruction-tuned version, or "
            "provide the data as prompt and completion.",
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # Several named templates and no default.
        raise _unusable(f"cannot be selected: {error}.") from error


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
) -> str:
    return str(
        _guarded(
            lambda: tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )
    )


def _guarded(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except _TEMPLATE_ERRORS as error:
        raise MisfitError(f"the chat template refuses the conversation: {error}") from error


def _unusable(problem: str) -> StageError:
    return StageError(
        "ChatTemplate",
        f"the chat template {problem}",
        advice="Set spec.data.chatTemplate to a template that fits the data and the model.",
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: Message) -> str:
    try:
        plain = _render(tokenizer, template, [question])
        prompted = _render(tokenizer, template, [question], prompt=True)
    except MisfitError:
        return ""
    return prompted[len(plain) :] if prompted.startswith(plain) else ""


def _first_special(tokenizer: PreTrainedTokenizerBase, tail: str) -> str | None:
    """Return the first special token in `tail`, else the first added token that is not white space
    (some tokenizers do not mark their <end_of_turn> as special). None: there is neither."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    for candidates in (special.union(tokenizer.all_special_tokens), {t.content for t in added}):
        found = [
            (tail.index(token), -len(token), token)
            for token in candidates
            if token.strip() and token in tail
        ]
        if found:
            return min(found)[2]
    return None


def _end_of_answer(text: str, start: int, content: str, following: str) -> int | None:
    """Return the end of `content`, which may be trimmed. None: the text at `start` is not `content`
    followed by `following`."""
    for written in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = start + len(written)
        if text.startswith(written, start) and text.startswith(following, end):
            return end
    return None
