"""The proof of masks: what is refused, and a row's text with its targets marked."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.trainer.conftest import CHATML
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.masks import MaskProof, Run, runs
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, Message

EXAMPLE = Example(
    1, "chat", (Message("user", "Which lamp?"), Message("assistant", "The rote Lampe: ü😀."))
)
ALL_GENERATED = "{% generation %}" + CHATML + "{% endgeneration %}"


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encoded(encoder: Encoder, example: Example = EXAMPLE) -> Encoded:
    (found,) = encoder.encode([example])
    assert isinstance(found, Encoded)
    return found


def proof(encoder: Encoder, *pieces: Encoded, example: Example = EXAMPLE) -> StageError | None:
    found = MaskProof()
    found.add(example, pieces, encoder)
    try:
        found.check("spec.data.train[0]", encoder)
    except StageError as error:
        return error
    return None


def test_the_runs_of_a_row_are_its_text_with_the_targets_marked(tiny_tokenizer: Any) -> None:
    """A character of several tokens stays whole."""
    assert runs(tiny_tokenizer, encoded(Encoder(tiny_tokenizer, "assistant"))) == [
        Run("<|im_start|>user\nWhich lamp?<|im_end|>\n<|im_start|>assistant\n", trained=False),
        Run("The rote Lampe: ü😀.<|im_end|>", trained=True),
        Run("\n", trained=False),
    ]


def test_correct_masks_pass_with_and_without_a_chat_template(tiny_tokenizer: Any) -> None:
    for template, train_on in ((CHATML, "assistant"), (CHATML, "all"), (None, "assistant")):
        encoder = Encoder(with_template(tiny_tokenizer, template), train_on)  # type: ignore[arg-type]
        example = EXAMPLE
        if template is None:
            example = Example(1, "completion", EXAMPLE.messages, "Which lamp?", " Red.")
        assert proof(encoder, encoded(encoder, example), example=example) is None


def test_a_template_that_generates_the_whole_conversation_is_refused(tiny_tokenizer: Any) -> None:
    encoder = Encoder(with_template(tiny_tokenizer, ALL_GENERATED), "assistant")
    error = proof(encoder, encoded(encoder))
    assert error is not None
    assert error.reason == "ContextTrained"
    assert "spec.data.train[0]" in error.message
    encoder = Encoder(with_template(tiny_tokenizer, ALL_GENERATED), "all")
    assert proof(encoder, encoded(encoder)) is None


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}TURN{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = "{{ m.content + '<|im_end|>' }}"
BLOCK = "{% generation %}" + SAID + "{% endgeneration %}"


@pytest.mark.parametrize(
    "turn",
    [
        BLOCK,
        "{% if m.role == 'user' %}" + BLOCK + "{% else %}" + SAID + "{% endif %}",
        "{{ m.content }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
    ],
)
def test_a_template_whose_blocks_mark_other_text_than_the_answers_is_refused(
    tiny_tokenizer: Any, turn: str
) -> None:
    template = TURNS.replace("TURN", turn)
    encoder = Encoder(with_template(tiny_tokenizer, template), "assistant")
    error = proof(encoder, encoded(encoder))
    assert error is not None
    assert error.reason == "ContextTrained"
    assert "{% generation %} blocks" in error.message
    encoder = Encoder(with_template(tiny_tokenizer, template), "all")
    assert proof(encoder, encoded(encoder)) is None


def test_a_template_whose_blocks_mark_the_answers_passes(tiny_tokenizer: Any) -> None:
    turn = "{% if m.role == 'assistant' %}" + BLOCK + "{% else %}" + SAID + "{% endif %}"
    encoder = Encoder(with_template(tiny_tokenizer, TURNS.replace("TURN", turn)), "assistant")
    assert proof(encoder, encoded(encoder)) is None


def test_a_set_whose_stop_token_is_always_cut_off_is_refused(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer, "assistant")
    row = encoded(encoder)
    error = proof(encoder, Encoded(row.ids[:-4], row.mask[:-4]))
    assert error is not None
    assert error.reason == "NoStopToken"
    assert "maxLength" in error.advice


def test_documents_need_no_stop_token(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer, "all")
    example = Example(1, "text", text="A lamp.")
    row = encoded(encoder, example)
    assert proof(encoder, Encoded(row.ids[:-1], row.mask[:-1]), example=example) is None


@pytest.mark.parametrize("reasoning", [True, False])
def test_what_the_template_does_not_render_is_counted(tiny_tokenizer: Any, reasoning: bool) -> None:
    """Reasoning that the job drops is no loss."""
    turns = (Message("user", "Which?"), Message("assistant", "Red.", reasoning="Hm."))
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    encoder = Encoder(tiny_tokenizer, "assistant", reasoning=reasoning)
    encoded(encoder, Example(1, "chat", turns, tools=(tool,)))
    assert encoder.left_out["tools"] == 1
    assert encoder.left_out["reasoning"] == int(reasoning)


def test_dropped_reasoning_leaves_the_answer(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer, "assistant", reasoning=False)
    answer = Message("assistant", "<think>\nHm.\n</think>\n\nRed.", reasoning="Hm.")
    row = encoded(encoder, Example(1, "chat", (Message("user", "Which?"), answer)))
    assert [run.text for run in runs(tiny_tokenizer, row) if run.trained] == ["Red.<|im_end|>"]


@pytest.mark.parametrize(
    "part",
    [
        "{{ 1 // (messages | length - 2) }}",
        "{% for i in range(messages[1].content | length * 10000) %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(messages | length) }}",
    ],
)
def test_a_template_that_fails_for_a_row_refuses_it(tiny_tokenizer: Any, part: str) -> None:
    """Errors of arithmetic and endless recursion ended the stage without a row or a remedy."""
    template = CHATML + "{% if messages[0].content | length > 5 %}" + part + "{% endif %}"
    encoder = Encoder(with_template(tiny_tokenizer, template), "assistant")
    short = Example(1, "chat", (Message("user", "Who?"), EXAMPLE.messages[1]))
    found = encoder.encode([EXAMPLE, short])
    assert [type(row) for row in found] == [Misfit, Encoded]
