"""What may stand in a message."""

import pickle

import pytest

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.redact import LONGEST, one_line, redact, redacted, source_name

SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/pairs.jsonl",
        f"s3://key:{SECRET[:8]}/{SECRET}@bucket/pairs.jsonl",
        f"s3://key:{SECRET[:8]}?{SECRET}@bucket/pairs.jsonl",
        f"s3:/key:{SECRET}@bucket/pairs.jsonl",
        f"https://{SECRET}@host/a",
        f"https://host/a?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
        f"abfs://box@account.dfs.core.windows.net/a?sig={SECRET}",
        f"https://host/a?token={SECRET}",
        f"data:application/json;base64,{SECRET}",
        f"401 for hf_{SECRET}",
        f"Authorization: Bearer {SECRET}",
    ],
)
def test_no_message_holds_credentials(text):
    for shown in (redact(text), str(InputError(f"cannot read '{text}'")), str(JobError(text)), source_name(text)):
        assert SECRET not in shown
        assert SECRET[:8] not in shown
    assert SECRET not in str(redacted({"registry": text, "more": [text, 1, None]}))


@pytest.mark.parametrize(
    "text",
    [
        "pairs/train.jsonl.gz, row 3: expected a text",
        "s3://bucket/a@2/pairs.jsonl",
        "http://127.0.0.1:8000/v1/models?limit=3",
        "helpful@production",
        "data: train.jsonl",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_an_error_is_one_printable_line_of_bounded_length():
    error = InputError("name 'a\nb\x1b[2J\u202e\ud800'\tis\r\nwrong")
    assert str(error) == r"name 'a b\u001b[2J\u202e\ud800' is  wrong"
    str(error).encode("utf-8")
    assert len(one_line("x" * 10_000_000)) <= LONGEST
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
