"""`/docs`: what the API takes, without a script and without another host."""

import re

import pytest
from starlette.testclient import TestClient

from prefvec_ray.serving.http.app import api
from prefvec_ray.serving.http.page import PAGE_HEADERS
from prefvec_ray.serving.http.reference import render


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(api)


def test_it_is_under_the_pages_policy_and_loads_nothing_foreign(client):
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == PAGE_HEADERS["content-security-policy"]
    assert "<script" not in answer.text
    assert " style=" not in answer.text
    sources = re.findall(r'(?:src|href)="([^"#]+)', answer.text)
    assert sources
    for source in sources:
        assert not source.startswith(("http:", "https:", "//")), source
        assert client.get(f"/{source}").status_code == 200, source


def test_it_names_every_route_and_field(client):
    text = client.get("/docs").text
    for said in (
        "POST /v1/chat/completions",
        "GET /v1/preferences",
        "top_logprobs",
        "max_completion_tokens",
        "ChatBody",
    ):
        assert said in text
    assert client.get("/redoc").status_code == 404


def test_whatever_a_document_says_is_text():
    hostile = "<script>alert(1)</script>"
    document = {
        "info": {"title": hostile, "description": hostile},
        "paths": {
            hostile: {
                "get": {
                    "description": hostile,
                    "requestBody": {"content": {"application/json": {"schema": {"$ref": hostile}}}},
                }
            }
        },
        "components": {
            "schemas": {
                hostile: {"description": hostile, "properties": {hostile: {"type": hostile, "enum": [hostile]}}}
            }
        },
    }
    assert b"<script" not in render(document)
