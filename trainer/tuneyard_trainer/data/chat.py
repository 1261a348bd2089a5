"""Which characters of a rendered conversation are the model's own to write.

That is everything after the generation prompt (`<|im_start|>assistant\n`) up to and with the token
that ends the answer, but not the white space that some templates put after it. A template that ends
answers with no token of its own is refused: a model tuned on it would never learn to stop.
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
"""One turn as chat templates take it: {"role": ..., "content": ...}."""
Span = tuple[int, int]
"""Characters of a rendering, from and up to."""

OWN_TEMPLATE = "Set spec.data.chatTemplate to a template that fits the data and the model."

_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "TuneyardAnswerGoesHere{}."
_PLACEHOLDERS = re.compile(r"TuneyardAnswerGoesHere\d+\.")
# What templates raise on rows they are not made for: by raise_exception, or by what they assume.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


class MisfitError(Exception):
    """The template and this conversation do not go together."""


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer's chat template writes an answer, found out once by rendering a sample."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    stop: str
    """What follows an answer, up to and with the stop token: usually the token alone."""
    stop_token: str
    prompt: str
    """What a request for an answer adds to the rendering; "" where the template ignores it."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Raises StageError ChatTemplate or NoStopToken where the template cannot be trained on."""
        template = _template(tokenizer)
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _PLACEHOLDER.format(0)}
        try:
            sample = _render(tokenizer, template, [question, answer])
        except MisfitError as error:
            raise _unusable(f"cannot render a question and its answer: {error}.") from error
        tail = sample.partition(answer["content"])[2]
        if tail == "" and not sample.endswith(answer["content"]):
            raise _unusable("leaves the assistant's answer out.")
        token = _first_special(tokenizer, tail)
        if token is None:
            raise StageError(
                "NoStopToken",
                "the chat template ends an answer with no special token of the tokenizer (after "
                f"the answer comes {tail!r}), so a tuned model could not stop.",
                advice="Set spec.data.chatTemplate to one that writes {{ eos_token }} after each "
                "answer.",
            )
        stop = tail[: tail.index(token) + len(token)]
        return cls(tokenizer, template, stop, token, _prompt(tokenizer, template, question))

    def targets(self, messages: Sequence[Message], train_on: TrainOn) -> tuple[str, list[Span]]:
        """The rendered conversation and which of its characters are targets, in order.

        Raises MisfitError where the template refuses the conversation or rewrites an answer.
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

    # ---- where the answers are ------------------------------------------------------------------

    def _render_blocks(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """By the template's own {% generation %} blocks."""
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
        """Authors put the stop token inside the block, outside, or inside with a line's end."""
        start, end = block
        inside = text[start:end].rstrip()
        if inside.endswith(self.stop_token):
            return start, start + len(inside)
        return start, self._end(text, end)

    def _by_placeholder(
        self, messages: Sequence[Message], turns: Sequence[int], text: str
    ) -> list[Span] | None:
        """By rendering once more with placeholders for the answers: what lies between them must be
        the same in both. None where it is not, as in templates that look into an answer."""
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
        """By rendering what comes before each answer, with the request for one. Raises MisfitError
        where the answer does not follow as it is."""
        spans: list[Span] = []
        for turn in turns:
            before = _render(self.tokenizer, self.template, messages[:turn], prompt=True)
            end = _end_of_answer(text, len(before), messages[turn]["content"], "")
            if not text.startswith(before) or end is None:
                raise MisfitError(
                    f"the chat template rewrites the answer in turn {turn + 1} (or what is before "
                    "it), as templates do that strip the reasoning of earlier turns"
                )
            spans.append((len(before), end))
        return spans

    def _start(self, before: Sequence[Message], text: str, answer: int) -> int:
        """Where the model begins to write: at the answer, or ahead of it where the template puts
        something between the generation prompt and the answer (a space, an empty <think> block)."""
        if self.prompt and text.endswith(self.prompt, 0, answer):
            return answer
        prompt = _render(self.tokenizer, self.template, before, prompt=True)
        if not text.startswith(prompt) or len(prompt) > answer:
            return answer
        # Where the template ignores the request, a header may follow, which is not to be learnt.
        return len(prompt) if self.prompt or text[len(prompt) : answer].isspace() else answer

    def _end(self, text: str, answer_end: int) -> int:
        """Past the stop token; at the answer's end where an earlier turn is written without one."""
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
    """A conversation up to where the model's answer begins. `template`: in place of the
    tokenizer's. Raises MisfitError where the template refuses the conversation."""
    chosen = template or tokenizer.get_chat_template()
    return _render(tokenizer, chosen, messages, prompt=True)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise StageError(
            "ChatTemplate",
            f"{type(tokenizer).__name__} tells no character offsets, so the answers' tokens cannot "
            "be told apart.",
            advice="Choose a model with a tokenizer.json.",
        )
    if not tokenizer.chat_template:
        raise StageError(
            "ChatTemplate",
            "the data are conversations, and the model's tokenizer has no chat template: it is a "
            "base model.",
            advice="Set spec.data.chatTemplate, choose the model's instruction-tuned version, or "
            "bring the data as prompt and completion.",
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # Several named templates and no default.
        raise _unusable(f"cannot be chosen: {error}.") from error


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
        raise MisfitError(f"the chat template says: {error}") from error


def _unusable(what: str) -> StageError:
    return StageError("ChatTemplate", f"the chat template {what}", advice=OWN_TEMPLATE)


def _prompt(tokenizer: PreTrainedTokenizerBase, template: str, question: Message) -> str:
    try:
        plain = _render(tokenizer, template, [question])
        asking = _render(tokenizer, template, [question], prompt=True)
    except MisfitError:
        return ""
    return asking[len(plain) :] if asking.startswith(plain) else ""


def _first_special(tokenizer: PreTrainedTokenizerBase, tail: str) -> str | None:
    """The first special token in `tail`; else the first added token that is no white space (some
    tokenizers forget to call their <end_of_turn> special)."""
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
    """Where `content`, as it is or trimmed, ends if it stands at `start` before `following`."""
    for written in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = start + len(written)
        if text.startswith(written, start) and text.startswith(following, end):
            return end
    return None
