"""What is a credential, and that nothing is left of it; and what only looks like one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from trainer.redact import RedactedLines, Redactor, credential_in, secrets_of

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx4fm7dng\nqGf0T6kBAoGBAM+9Z3a=\n-----END RSA PRIVATE KEY-----"


def test_what_the_environment_holds_under_such_names() -> None:
    found = secrets_of(
        {"AWS_SECRET_ACCESS_KEY": "abcdefgh", "HF_TOKEN": "hf_0123456789", "TOKENIZERS_PARALLELISM": "false"}
        | {"SSH_KEY_FILE": "/home/me/.ssh/id", "PATH": "/usr/bin/x"}
    )
    assert found == ("hf_0123456789", "abcdefgh")


def test_a_secret_may_begin_as_a_place_does(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    places = {"MY_KEY": f"{tmp_path}/key", "A_TOKEN_PATH": "/nowhere/at/all", "SECRETS_DIR": "~/nowhere"}
    found = secrets_of({"AWS_SECRET_ACCESS_KEY": "/abcdefghi", "PGPASSWD": "~ijklmnop", **places})
    assert found == ("%2Fabcdefghi", "/abcdefghi", "~ijklmnop")


@pytest.mark.parametrize(
    ("name", "value", "secrets"),
    [
        ("MLFLOW_TRACKING_URI", "https://me:pass%2Fword@host/x", {"me:pass%2Fword", "pass%2Fword", "pass/word"}),
        ("https_proxy", "http://0123456789@proxy:3128", {"0123456789"}),
        ("AWS_ENDPOINT_URL_S3", "minio:min10-pass@host:9000", {"minio:min10-pass", "min10-pass"}),
        ("CORPUS", "https://host/x?sv=1&sig=abcdefgh%3D", {"abcdefgh%3D"}),
    ],
)
def test_what_an_address_holds(name: str, value: str, secrets: set[str]) -> None:
    assert secrets <= set(secrets_of({name: value}))


@pytest.mark.parametrize("value", ["s3://bucket/key@x", "http://host:9000/a@b", "hf://set@main", "host:9000"])
def test_an_address_without_any(value: str) -> None:
    assert secrets_of({"DATA_URL": value}) == ()


def test_forms_that_a_value_takes_on_its_way() -> None:
    value = "ab+c/d==\nsecond-line-of-the-key"
    redactor = Redactor({"A_SECRET": value, "HOME": "/home/somebody"})
    assert redactor.text(f"x {value} /home/somebody") == "x *** /home/somebody"
    assert redactor.text("x=ab%2Bc%2Fd%3D%3D%0Asecond-line-of-the-key") == "x=***"
    assert redactor.text(f"said {json.dumps(value)}") == 'said "***"'
    assert redactor.text("the second-line-of-the-key alone") == "the *** alone"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://u:p@h/x?X-Amz-Signature=abc&y=1", "https://***@h/x?X-Amz-Signature=***&y=1"),
        ("GET https://a.blob/x?sv=2024&sig=ab%2Fc%3D HTTP/1.1", "GET https://a.blob/x?sv=2024&sig=*** HTTP/1.1"),
        ("'gs://b/x?X-Goog-Signature=0a1b'", "'gs://b/x?X-Goog-Signature=***'"),
        ("https%3A%2F%2Fh%2Fx%3Ftoken%3Dabc", "https%3A%2F%2Fh%2Fx%3Ftoken%3D***"),
        ("s3://key:pass/word@bucket/x", "s3://***@bucket/x"),
        ("hub_token: abc\ntokenizer: abc", "hub_token: ***\ntokenizer: abc"),
        ("  - {api_key: abc, user: me}", "  - {api_key: ***, user: me}"),
        ('{"SecretAccessKey": "a/b+c", "n": 1}', '{"SecretAccessKey": "***", "n": 1}'),
        ('{\\"api_key\\": \\"abcdef\\"}', '{\\"api_key\\": \\"***\\"}'),
        ("login(token='abc', eos_token='</s>')", "login(token='***', eos_token='</s>')"),
        ("--password=abc --export=ALL,WANDB_API_KEY=abc", "--password=*** --export=ALL,WANDB_API_KEY=***"),
        ("Authorization: Bearer abc.def\nHost: h", "Authorization: ***\nHost: h"),
        ("sent 'Bearer 0123456789abcdef'", "sent '***'"),
        ("key AKIA0123456789ABCDEF is", "key *** is"),
        (f"hf_{'a1' * 17} and sk-proj-{'b2' * 12}", "*** and ***"),
        (f"{PEM}\nafter", "***\nafter"),
        (json.dumps({"key": PEM}), '{"key": "***"}'),
    ],
)
def test_places_and_shapes(text: str, left: str) -> None:
    redactor = Redactor({})
    assert redactor.text(text) == left
    assert redactor.text(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/*.jsonl", "hf://set@main", "http://host:9000/a@b", "https://host and a@b.c", "mail a@b.c",
        "token: unknown key; a recipe takes: name, model", "storage.password: unknown key", "eos_token: '</s>'",
        "pad_token='<pad>', max_token=3", "tokens_per_s: 12.5", "basic understanding", "a bearer certificate",
        "login(token=None)", "image: muster:0.1.0@sha256:abc", "part-?.jsonl?version=3", "key: metrics/000001.jsonl",
        "password=$PASSWORD", "risk-assessment_of_many_models",
    ],
)  # fmt: skip
def test_what_only_looks_like_one(text: str) -> None:
    assert Redactor({}).text(text) == text
    assert credential_in(text) is None


def test_fields_of_json() -> None:
    found = Redactor({}).clean({"api_key": "k", "n": [1, "password: x"], "key": "a", 3: ("AKIA0123456789ABCDEF",)})
    assert found == {"api_key": "***", "n": [1, "password: ***"], "key": "a", 3: ["***"]}


def test_a_private_key_in_pieces() -> None:
    for size in (1, 2, 3):
        redact, lines = RedactedLines(Redactor({})), f"before\n{PEM}\nafter\n".splitlines(keepends=True)
        pieces = ["".join(lines[at : at + size]) for at in range(0, len(lines), size)]
        left = b"".join(redact(piece.encode()) for piece in pieces).decode()
        assert "MII" not in left
        assert "qGf0" not in left
        assert left.startswith("before\n")
        assert left.endswith("after\n")


def test_what_follows_the_begin_of_a_key_is_not_hidden_for_ever() -> None:
    redact = RedactedLines(Redactor({}))
    redact(b"-----BEGIN PRIVATE KEY-----\n")
    assert redact(b"step 7: loss 1.5\n") == b"step 7: loss 1.5\n"


def test_bytes_that_are_no_text_stay() -> None:
    assert RedactedLines(Redactor({}))(b"\xff\x00 token=abc \x80\n") == b"\xff\x00 token=*** \x80\n"


@pytest.mark.parametrize(
    "part", ["x", "a-", "://", "://a:b", "?a=", "token", "'", 'key":"', "-----BEGIN PRIVATE KEY-----"]
)
def test_the_time_grows_with_the_length_alone(part: str) -> None:
    """A row of the data may hold anything: no pattern may go back and forth over it."""

    def seconds(length: int) -> float:
        text = part * (length // len(part)) + " token="
        begin = time.process_time()
        Redactor({}).text(text)
        return time.process_time() - begin

    assert seconds(1_000_000) < 100 * max(seconds(50_000), 1e-3)
