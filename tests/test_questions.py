# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Split conversations into questions that are asked as they are trained."""

import pytest

from vtlmm.data.encoding import encode_messages
from vtlmm.data.questions import question_parts, split_questions, split_row
from vtlmm.inference.generation import conversation


def user(text):
    """`■` is an image."""
    pieces = [("image", None) if piece == "■" else ("text", piece) for piece in text.split("|")]
    return {"role": "user", "content": [{"type": kind, "text": piece} for kind, piece in pieces]}


def says(text, role="assistant"):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def row(*messages, images=(), context=0):
    return {"messages": list(messages), "images": list(images), "num_context_messages": context}


def test_images_stay_in_their_places():
    [question] = split_questions([row(user("first:|■|second:|■|which is red ?"), says("second"), images=["a", "b"])])
    assert question["question"] == "first: <image> second: <image> which is red ?"
    kinds = [part.get("text") or part["type"] for part in question_parts(question["question"], 2)]
    assert kinds == ["first:", "image", "second:", "image", "which is red ?"]


@pytest.mark.parametrize("text", ["■|what ?", "what ?|■", "left|■|right|■|color ?", "■|■|color ?", "■", "hello"])
def test_a_question_is_asked_as_it_is_trained(processor, text):
    images = ["a"] * text.count("■")
    messages = [user(text), says("yes")]
    [question] = split_questions([row(*messages, images=images)])
    asked = processor.apply_chat_template(conversation(question), add_generation_prompt=True, tokenize=False)
    input_ids, supervised = encode_messages(processor, messages)
    trained = processor.tokenizer.decode(input_ids[~supervised][1:])
    assert "".join(asked.split()) == "".join(trained.split())


def test_later_questions_keep_earlier_images_only():
    messages = [user("■|what ?"), says("cat"), user("and|■|that ?"), says("dog"), user("■|who ?"), says("no one")]
    questions = split_questions([row(*messages, images=["a", "b", "c"])])
    assert [question["images"] for question in questions] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert questions[1]["question"] == "<image> and <image> that ?" and questions[2]["question"] == "who ?"
    assert [question["answer"] for question in questions] == ["cat", "dog", "no one"]


def test_system_message_and_context_come_before():
    messages = [says("be short", "system"), user("■|what ?"), says("cat"), user("why ?"), says("fur")]
    first, second = split_questions([row(*messages, images=["a"])])
    assert first["before"] == second["before"] == messages[:1]
    [given] = split_questions([row(*messages, images=["a"], context=4)])
    assert given["before"] == messages[:3] and given["images"] == ["a"] and given["question"] == "why ?"


def test_rows_without_answers():
    rows = [row(user("■|what ?"), images=["a"]), row(user("hi"), says("yo"), user("bye")), row(user("hi"), says("yo"))]
    assert [question["row"] for question in split_questions(rows)] == [1, 2]
    first, second, third = split_questions(rows, unanswered=True)
    assert (first["answer"], second["answer"], third["answer"]) == (None, None, "yo")
    assert second["question"] == "bye" and second["before"] == rows[1]["messages"][:2]


def test_split_row_keeps_rows_without_an_answer():
    broken = row(user("hi"))
    assert split_row(broken) == [broken]
    messages = [user("■|what ?"), says("cat"), user("why ?"), says("fur")]
    rows = split_row({**row(*messages, images=["a"]), "id": 7})
    assert [len(one["messages"]) for one in rows] == [2, 2] and [one["id"] for one in rows] == [7, 7]
    assert rows[1]["messages"][0] == user("■|why ?")
