# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The server with the OpenAI client and with LangChain."""

import pytest
from helpers.serving import NAME, QUESTION, build_serving_model, complete, data_uri, running_server, text_of, user


@pytest.fixture(scope="module")
def server():
    with running_server(build_serving_model(), api_key="key") as client:
        client.headers["Authorization"] = "Bearer key"
        yield client


@pytest.fixture
def ask(server):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="key", max_retries=0)

    def create(messages, **options):
        options = {"model": NAME, "temperature": 0, "max_tokens": 6, **options}
        return client.chat.completions.create(messages=messages, **options)

    create.client, create.openai = client, openai
    return create


def test_openai_client(server, ask):
    messages = user(QUESTION, data_uri())
    expected = text_of(complete(server, messages))
    reply = ask(messages, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in reply.choices] == [expected] * 2
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens / 2 == 6
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    assert [entry.id for entry in ask.client.models.list().data] == [NAME]
    assert ask.client.models.retrieve(NAME).id == NAME


def test_openai_stream(server, ask):
    expected = text_of(complete(server, user()))
    chunks = list(ask(user(), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage.completion_tokens == 6 and chunks[-2].choices[0].finish_reason == "length"


def test_openai_errors(ask):
    openai = ask.openai
    with pytest.raises(openai.BadRequestError, match="Unsupported field: tools") as error:
        ask(user(), tools=[{"type": "function", "function": {"name": "f"}}])
    assert error.value.param == "tools" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        ask(user(), model="another")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=ask.client.base_url, api_key="other", max_retries=0).models.list()


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    settings = {"base_url": f"{server.base_url}/v1", "api_key": "key", "max_retries": 0}
    chat = langchain.ChatOpenAI(model=NAME, temperature=0, max_tokens=6, **settings)
    messages = user(QUESTION, data_uri())
    expected = text_of(complete(server, messages))
    reply = chat.invoke(messages)
    assert reply.content == expected and reply.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in chat.stream(messages)) == expected
    assert [each.content for each in chat.batch([messages] * 3)] == [expected] * 3
