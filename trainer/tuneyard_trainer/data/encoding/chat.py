"""Chat templates: rendering, and the characters of a rendering that are targets of training.

The targets are the characters that the model itself must write: from the end of the generation
prompt (`<|im_start|>assistant\n`) to the end of the stop token. The white space that some templates
put after the stop token is no target. A template without a stop token is refused, because a model
tuned on it would never learn to stop.

Calls of tools and reasoning are rendered by the template too, in ways that differ between
templates (`template_style`). They are targets like the text of an answer. Results of tools are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.template_style import (
    REASONING_KEYS,
    MisfitError,
    TemplateStyle,
    common_prefix,
    common_suffix,
    guarded,
    render,
)
from tuneyard_trainer.data.reading.conversations import Message

TrainOn = Literal["assistant", "last-assistant", "all"]
Tools = Sequence[Mapping[str, Any]]
"""The tools that the assistant may call, as JSON schemas."""
_TRANSCRIPT_ROLES = {"user": "Human", "assistant": "Assistant"}
Span = tuple[int, int]
"""Start and end of a range of characters in a rendering."""

_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "TuneyardAnswerGoesHere{}."
_PLACEHOLDERS = re.compile(r"TuneyardAnswerGoesHere\d+\.")
_MARK = "\ue000tuneyard\ue000"
"""A text of a private-use character, which stands in no conversation."""
_SPECIAL = frozenset({"tool_calls", *REASONING_KEYS})
"""The fields of turns that make targets of more than the content."""
_OPENED = re.compile(r"<think>\s*$")
"""The end of a generation prompt that begins the reasoning."""


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
    header: str = ""
    """The text before an answer, if the template writes no generation prompt."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the format. Raises StageError ChatTemplate or NoStopToken for a template that
        training cannot use."""
        template = _template(tokenizer)
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _PLACEHOLDER.format(0)}
        try:
            sample = render(tokenizer, template, [question, answer])
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
        prompt = _prompt(tokenizer, template, question)
        header = "" if prompt else _header(tokenizer, template, question, sample)
        return cls(tokenizer, template, stop, token, prompt, header)

    @cached_property
    def style(self) -> TemplateStyle:
        """How the template renders tools and reasoning."""
        return TemplateStyle.of(self.tokenizer, self.template)

    @cached_property
    def blocks_are_wrong(self) -> bool:
        """Whether the template's {% generation %} blocks hold a question, or not its answer."""
        if not _BLOCKS.search(self.template):
            return False
        question, answer = _PLACEHOLDER.format(1), _PLACEHOLDER.format(0)
        turns: list[Message] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        try:
            text, spans = self._render_blocks(turns, ())
        except MisfitError:
            return False
        blocks = [text[start:end] for start, end in spans]
        asked, answered = (any(each in block for block in blocks) for each in (question, answer))
        return bool(blocks) and (asked or not answered)

    def targets(
        self,
        messages: Sequence[Message],
        train_on: TrainOn,
        *,
        tools: Tools = (),
        trained: Sequence[bool | None] = (),
    ) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the spans of its targets, in order.

        `trained`: whether each turn is trained on, if the row says so; it has precedence over
        `train_on`, except over "all". Raises MisfitError if the template refuses the conversation,
        omits a call or rewrites an answer.
        """
        styled = self.style.apply(messages) if _is_special(messages) else list(messages)
        if train_on == "all":
            text = self._render(styled, tools)
            return text, [(0, len(text))]
        turns = _chosen(messages, train_on, trained)
        if _is_special(styled):
            text = self._render(styled, tools)
            return text, [self._by_difference(styled, turn, text, tools) for turn in turns]
        if _BLOCKS.search(self.template):
            text, blocks = self._render_blocks(styled, tools)
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(blocks) == len(answers):
                blocks = [block for i, block in zip(answers, blocks, strict=True) if i in turns]
            elif train_on == "last-assistant":
                blocks = blocks[-1:]
            if len(blocks) == len(turns) or not any(flag is not None for flag in trained):
                return text, [self._with_stop(text, block) for block in blocks]
        text = self._render(styled, tools)
        found = self._by_search(styled, turns, text)
        if found is not None:
            return text, found
        spans = self._by_placeholder(styled, turns, text, tools)
        if spans is None:
            spans = self._by_prompt(styled, turns, text, tools)
        return text, [
            (self._start(styled[:turn], text, start, tools), self._end(text, end))
            for turn, (start, end) in zip(turns, spans, strict=True)
        ]

    # ---- finding the answers --------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> str:
        return render(self.tokenizer, self.template, messages, tools, prompt=prompt)

    def _render_blocks(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        """Return the rendering and its answers, found by the template's {% generation %} blocks."""
        specials: dict[str, Any] = self.tokenizer.special_tokens_map
        rendered, blocks = guarded(
            lambda: render_jinja_template(
                [list(messages)],
                tools=[dict(tool) for tool in tools] or None,
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

    def _by_search(
        self, messages: Sequence[Message], turns: Sequence[int], text: str
    ) -> list[Span] | None:
        """Return the answers with their stop tokens, found between generation prompt and stop.

        None: the prompt is not before each answer and nowhere else, or an answer is not between
        the two. The other ways to find the answers render the conversation again.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.prompt or text.count(self.prompt) != len(answers):
            return None
        spans: dict[int, Span] = {}
        position = 0
        for turn in answers:
            header = text.find(self.prompt, position)
            start = header + len(self.prompt)
            end = _end_of_answer(text, start, messages[turn]["content"], self.stop)
            if header < 0 or end is None:
                return None
            position = end + len(self.stop)
            spans[turn] = (start, position)
        return [spans[turn] for turn in turns]

    def _by_placeholder(
        self, messages: Sequence[Message], turns: Sequence[int], text: str, tools: Tools
    ) -> list[Span] | None:
        """Return the answers, found by a second rendering with placeholders for the answers.

        None: the text between the answers differs from the first rendering, as with templates
        that parse the answers.
        """
        marked = [dict(message) for message in messages]
        for turn in turns:
            marked[turn]["content"] = _PLACEHOLDER.format(turn)
        pieces = _PLACEHOLDERS.split(self._render(marked, tools))
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
        self, messages: Sequence[Message], turns: Sequence[int], text: str, tools: Tools
    ) -> list[Span]:
        """Return the answers, found by rendering the turns before each answer with the generation
        prompt. Raises MisfitError if the answer does not follow unchanged."""
        spans: list[Span] = []
        for turn in turns:
            before = self._render(messages[:turn], tools, prompt=True)
            end = _end_of_answer(text, len(before), messages[turn]["content"], "")
            if not text.startswith(before) or end is None:
                raise MisfitError(
                    f"the chat template changes the answer in turn {turn + 1} or the text before "
                    "it; templates that strip the reasoning of earlier turns do this"
                )
            spans.append((len(before), end))
        return spans

    def _start(self, before: Sequence[Message], text: str, answer: int, tools: Tools) -> int:
        """Return the position at which the model begins to write.

        That is the answer's start, or before it if the template puts text between the generation
        prompt and the answer (a space, an empty <think> block).
        """
        if self.prompt and text.endswith(self.prompt, 0, answer):
            return answer
        prompt = self._render(before, tools, prompt=True)
        if not text.startswith(prompt) or len(prompt) > answer:
            # Mistral's templates write the system prompt in the last question, not in the first.
            tail = self._tail(before, tools)
            begin = len(text[:answer].rstrip())
            return begin if tail and text.endswith(tail, 0, begin) else answer
        # Without a generation prompt the text may be a header, which is no target.
        return len(prompt) if self.prompt or text[len(prompt) : answer].isspace() else answer

    def _end(self, text: str, answer_end: int) -> int:
        """Return the end of the stop token; the answer's end if the template writes no stop token
        after this turn."""
        if text.startswith(self.stop, answer_end):
            return answer_end + len(self.stop)
        spaced = re.compile(r"\s*" + re.escape(self.stop_token)).match(text, answer_end)
        return spaced.end() if spaced else answer_end

    # ---- answers with calls or reasoning --------------------------------------------------------

    def _by_difference(
        self, messages: Sequence[Message], turn: int, text: str, tools: Tools
    ) -> Span:
        """Return the characters of a turn that the model writes.

        The turn's own text is where the rendering changes with the turn's content, reasoning and
        arguments. Around it are literals of the template (`<tool_call>`, `</think>`), which begin
        after the generation prompt and end with the stop token.
        """
        first, last = self._changed(messages, turn, text, tools)
        before = self._changed(messages, turn - 1, text, tools)[1] if turn else 0
        limit = len(text)
        if turn + 1 < len(messages):
            limit = self._changed(messages, turn + 1, text, tools)[0]
        if not before <= first <= last <= limit:
            raise MisfitError(f"the chat template mixes turn {turn + 1} with its neighbors")
        start = self._begin(messages, turn, text, (before, first), tools)
        _check_complete(messages[turn], turn, text[start:last])
        stop = text.find(self.stop_token, last, limit)
        if stop >= 0:
            return start, stop + len(self.stop_token)
        return start, last + len(self.style.closing(text[last:limit]))

    def _changed(self, messages: Sequence[Message], turn: int, text: str, tools: Tools) -> Span:
        """Return the range of the rendering that changes with a turn. Raises MisfitError if nothing
        does: the template omits the turn."""
        marked = [*messages[:turn], _marked(messages[turn]), *messages[turn + 1 :]]
        other = self._render(marked, tools)
        start = common_prefix(text, other)
        if start == len(text) == len(other):
            raise MisfitError(f"the chat template omits turn {turn + 1}")
        end = len(text) - common_suffix(text, other)
        return start, max(start, end)

    def _begin(
        self, messages: Sequence[Message], turn: int, text: str, between: Span, tools: Tools
    ) -> int:
        """Return the position at which the model begins to write a turn. `between`: the template's
        text between the turns."""
        start, end = between
        header = self.prompt or self.header
        found = text.rfind(header, start, end) if header else -1
        if found >= 0:
            return found + len(header)
        tail = self._tail(messages[:turn], tools)
        for literal in (tail, _OPENED.sub("", tail)):
            if text.startswith(literal, start, end):
                return start + len(literal)
        raise MisfitError(f"the chat template writes no generation prompt before turn {turn + 1}")

    def _tail(self, before: Sequence[Message], tools: Tools) -> str:
        """Return the text between a turn and the answer to it, with the generation prompt."""
        marked = [*before[:-1], _marked(before[-1])]
        return self._render(marked, tools, prompt=True).rpartition(_MARK)[2]


def _check_complete(message: Message, turn: int, text: str) -> None:
    """Raise MisfitError if a turn's rendering lacks a call or the text beside the calls."""
    calls = message.get("tool_calls", ())
    missing = [call["function"]["name"] for call in calls if call["function"]["name"] not in text]
    if missing:
        raise MisfitError(f"the chat template omits the call of {missing[0]} in turn {turn + 1}")
    if calls and message["content"] and message["content"].strip() not in text:
        raise MisfitError(
            f"the chat template omits the text beside the calls in turn {turn + 1}: remove one of "
            "them from the row"
        )


def _marked(message: Message) -> Message:
    """Return a turn with other texts and arguments."""
    marked = dict(message)
    if message["content"] or "tool_calls" not in message:
        marked["content"] = _MARK
    for key in message.keys() & set(REASONING_KEYS):
        marked[key] = _MARK
    if "tool_calls" in message:
        marked["tool_calls"] = [_marked_call(call) for call in message["tool_calls"]]
    return marked


def _marked_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments: Any = {_MARK: _MARK}
    if isinstance(function["arguments"], str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _is_special(messages: Sequence[Message]) -> bool:
    """Return whether a turn has calls or reasoning."""
    return any(not _SPECIAL.isdisjoint(turn) for turn in messages)


def _chosen(
    messages: Sequence[Message], train_on: TrainOn, trained: Sequence[bool | None]
) -> list[int]:
    """Return the turns to train on."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    by_job = answers if train_on == "assistant" else answers[-1:]
    said = dict(enumerate(trained))
    return [i for i in answers if (i in by_job if said.get(i) is None else said[i])]


# ---- rendering --------------------------------------------------------------------------------


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    tools: Tools = (),
) -> str:
    """Return the conversation's rendering with the generation prompt.

    `template`: used instead of the tokenizer's. Raises MisfitError if the template refuses the
    conversation.
    """
    chosen = template or tokenizer.get_chat_template()
    if _is_special(messages):
        messages = TemplateStyle.of(tokenizer, chosen).apply(messages)
    return render(tokenizer, chosen, messages, tools, prompt=True)


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


def _unusable(problem: str) -> StageError:
    return StageError(
        "ChatTemplate",
        f"the chat template {problem}",
        advice="Set spec.data.chatTemplate to a template that fits the data and the model.",
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: Message) -> str:
    try:
        plain = render(tokenizer, template, [question])
        prompted = render(tokenizer, template, [question], prompt=True)
    except MisfitError:
        return ""
    return prompted[len(plain) :] if prompted.startswith(plain) else ""


def _header(
    tokenizer: PreTrainedTokenizerBase, template: str, question: Message, sample: str
) -> str:
    """Return the text between a question and its answer in a sample of both; "": white space."""
    try:
        plain = render(tokenizer, template, [question])
    except MisfitError:
        return ""
    header = sample.partition(_PLACEHOLDER.format(0))[0].removeprefix(plain)
    return header if header.strip() and sample.startswith(plain) else ""


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
