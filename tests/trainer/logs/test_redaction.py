"""No secret of a process reaches its kept log."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest

from tuneyard_trainer.logs.redaction import REDACTED, Redactor

AWS_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "minio-user",
    "AWS_SECRET_ACCESS_KEY": AWS_KEY,
    "TUNEYARD_SECRET_HF_TOKEN": "my-own-token",
    "TUNEYARD_SECRET_JUDGE_API_FILE": "named-like-a-file",
    "RAY_AUTH_TOKEN": "0123456789abcdef",
    "HTTPS_PROXY": "http://proxy-user:proxy-pass@proxy:3128",
    "GCP_CREDENTIALS": json.dumps({"type": "service_account", "private_key": "first\nsecond-line"}),
    "MULTILINE_SECRET": "line-number-1\nline-number-2",
}
SECRETS = [
    *("minio-user", AWS_KEY, "my-own-token", "named-like-a-file", "0123456789abcdef"),
    *("proxy-pass", "second-line", "line-number-1", "line-number-2"),
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "form", [str, lambda value: quote(value, safe=""), lambda value: json.dumps({"x": value})]
)
def test_the_value_of_a_secret_variable_is_replaced(secret: str, form: object) -> None:
    assert callable(form)
    text = form(secret)
    line = Redactor(ENVIRONMENT)(f"before {text} and {text}, after")
    assert line.startswith("before ")
    assert line.endswith(", after")
    assert secret not in line
    assert text not in line
    assert line.count(REDACTED) == 2


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_in_base64_is_replaced(encode: Callable[[bytes], bytes]) -> None:
    encoded = encode(AWS_KEY.encode()).decode()
    assert Redactor(ENVIRONMENT)(f"sent {encoded}") == f"sent {REDACTED}"


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("cannot reach s3://user:pa55word@host/x", "pa55word"),
        ("clone https://ghp_justatoken@github.com/x", "justatoken"),
        ("GET /x?X-Amz-Signature=abcdef&y=1", "abcdef"),
        ("GET /x?sv=2020&sig=ab%2Fcd&y=1", "ab%2Fcd"),
        ("headers {'Authorization': 'Bearer short'}", "short"),
        ("headers {'Authorization': 'Basic dXNlcg=='}", "dXNlcg"),
        ("Authorization: token0123456789", "token0123456789"),
        ("sent Bearer abcdefgh.ijkl", "abcdefgh"),
        ("using hf_abcdefghijklmnopqrstuvwxyz0123", "hf_abc"),
        ("using AKIAIOSFODNN7EXAMPLE", "AKIA"),
        ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln", "eyJ"),
        ("aws_secret_access_key = abcd/efgh", "abcd/efgh"),
        ('{"password": "correct-horse"}', "correct-horse"),
        ("api-key: k12345", "k12345"),
        ("-----BEGIN RSA PRIVATE KEY-----\\nMIIE\\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ],
)
def test_a_secret_in_a_known_format_is_replaced(line: str, secret: str) -> None:
    redacted = Redactor({})(line)
    assert secret not in redacted
    assert REDACTED in redacted


@pytest.mark.parametrize(
    "line",
    [
        "step=3 tokens=1422 pad_token='<pad>' eos_token_id=2",
        "a tokenizer without a secret, and basic assumptions",
        "s3://models/support-bot/stages/sft and http://127.0.0.1:8265/api",
        "false true /tmp/work",
    ],
)
def test_ordinary_lines_stay(line: str) -> None:
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "PWD": "/tmp/work",
        "OLDPWD": "/tmp/work",
        "SHORT_KEY": "true",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/tmp/work",
    }
    assert Redactor(environment)(line) == line


def test_the_beginning_of_a_secret_at_the_end_of_an_unfinished_line_is_replaced() -> None:
    redact = Redactor({"TOKEN": "abcdefghij"})
    assert redact.unfinished("the token is abcdefg") == f"the token is {REDACTED}"
    assert redact.unfinished("the token is abc") == "the token is abc"
    assert redact.unfinished("abcdefghij abcdefghij") == f"{REDACTED} {REDACTED}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"password": "abc def, ghi", "step": 1}', '{"password": "[redacted]", "step": 1}'),
        ("password='it is \"this\"' step=1", "password='[redacted]' step=1"),
        (
            r'"{\"api_key\": \"abc def\", \"step\": 1}"',
            r'"{\"api_key\": \"[redacted]\", \"step\": 1}"',
        ),
        (r'"{\"api_key\": \"abcdef\"}"', r'"{\"api_key\": \"[redacted]\"}"'),
    ],
)
def test_a_quoted_value_is_replaced_to_its_last_character(line: str, expected: str) -> None:
    """Also in a JSON string that holds JSON."""
    assert Redactor({})(line) == expected
