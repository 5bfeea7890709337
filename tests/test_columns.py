# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""No column of a known dataset format is ignored silently: it is used, or the row is rejected by name."""

import pytest

from vtlmm.data.columns import apply_columns, parse_columns, suggest_columns
from vtlmm.data.formats import convert_row
from vtlmm.train.setting_types import convert_setting


FROM = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]
CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]
USED, REJECTED, METADATA = "used", "rejected", "metadata"
# Format, a row of the format, and for each further column its value and what happens with it
COLUMNS = {
    "LLaVA": (
        {"conversations": FROM},
        {
            "id": ("000000033471", METADATA),
            "image": ("a.jpg", USED),
            "model": ("gpt-4", METADATA),
            "system": ("Be short.", USED),
            "video": ("a.mp4", REJECTED),
        },
    ),
    "ShareGPT and LLaMA-Factory": (
        {"conversations": FROM},
        {
            "system": ("Be short.", USED),
            "tools": ('[{"name": "search"}]', REJECTED),
            "images": (["a.jpg"], USED),
            "videos": (["a.mp4"], REJECTED),
            "audios": (["a.wav"], REJECTED),
            "chosen": ({"from": "gpt", "value": "x"}, REJECTED),
            "rejected": ({"from": "gpt", "value": "y"}, REJECTED),
        },
    ),
    "LLaMA-Factory Alpaca": (
        {"instruction": "ask", "output": "reply"},
        {
            "input": ("more", USED),
            "system": ("Be short.", USED),
            "history": ([["hi", "hello"]], USED),
            "images": (["a.jpg"], USED),
            "text": ("unrelated", REJECTED),
        },
    ),
    "TRL": (
        {"messages": CHAT},
        {
            "images": (["a.jpg"], USED),
            "image": ("a.jpg", USED),
            "num_context_messages": (1, USED),
            "prompt": ("another question", REJECTED),
            "completion": ("another answer", REJECTED),
            "label": (True, REJECTED),
            "tools": ([{"name": "search"}], REJECTED),
            "chat_template_kwargs": ({"thinking": True}, REJECTED),
        },
    ),
    "ms-swift": (
        {"query": "ask", "response": "reply"},
        {
            "system": ("Be short.", USED),
            "history": ([["hi", "hello"]], USED),
            "images": (["a.jpg"], USED),
            "videos": (["a.mp4"], REJECTED),
            "audios": (["a.wav"], REJECTED),
            "tools": ("[{}, {}]", REJECTED),
            "objects": ({"ref": ["cat"], "bbox": [[0, 0, 1, 1]]}, REJECTED),
            "rejected_response": ("no", REJECTED),
            "channel": ("web", METADATA),
        },
    ),
    "Instruction datasets of the Hub": (
        {"question": "ask", "answer": "reply"},
        {
            "system_prompt": ("Be short.", USED),
            "image": ("a.jpg", USED),
            "photo": ("a.jpg", REJECTED),
            "image_1": ({"bytes": b"\x89PNG", "path": None}, REJECTED),
            "second_image": ("data:image/png;base64,iVBORw0KGgo", REJECTED),
            "choices": (["a", "b"], REJECTED),
            "context": ("a passage", REJECTED),
            "hint": ("a hint", REJECTED),
            "caption": ("a cat", REJECTED),
            "text": ("a cat", REJECTED),
            "response": ("another answer", REJECTED),
            "question_type": ("yes/no", METADATA),
            "source": ("VQAv2", METADATA),
            "license": ("cc-by", METADATA),
        },
    ),
    "Images with captions": (
        {"image": "a.jpg", "caption": "a cat"},
        {
            "url": ("https://example.com/other.jpg", METADATA),
            "filename": ("a.jpg", METADATA),
            "label": (3, REJECTED),
            "mask": ("a_mask.png", REJECTED),
            "text": ("another caption", REJECTED),
        },
    ),
}
CASES = [(name, column) for name, (_, columns) in COLUMNS.items() for column in columns]


def convert(row, **options):
    return convert_row(row, 3, "rows.json", "/images", **options)


@pytest.mark.parametrize("name, column", CASES)
def test_columns_are_used_or_rejected(name, column):
    row, columns = COLUMNS[name]
    value, expected = columns[column]
    plain = convert(row)
    if expected == REJECTED:
        with pytest.raises(ValueError, match=f"rows.json, row 3: column `{column}` would be ignored.*{column}: null"):
            convert({**row, column: value})
        assert convert({**row, column: value}, columns={column: None}) == plain
    elif expected == METADATA:
        assert convert({**row, column: value}) == plain
    elif row.get(column) != value:
        assert convert({**row, column: value}) != plain


@pytest.mark.parametrize("value", [None, "", [], {}, float("nan")])
def test_empty_columns_are_ignored(value):
    row = {"question": "ask", "answer": "reply", "image": "a.jpg"}
    columns = ("images", "system", "tools", "choices", "photo", "messages", "text", "history")
    assert convert({**row, **dict.fromkeys(columns, value)}) == convert(row)


def test_different_images_in_two_columns():
    row = {"question": "ask", "answer": "reply", "image": "a.jpg", "images": ["b.jpg"]}
    with pytest.raises(ValueError, match="row 3 has different images in `image` and `images`"):
        convert(row)
    [same] = convert({**row, "images": ["a.jpg"]})
    assert len(same["images"]) == 1
    part = {"type": "image", "image": "c.jpg"}
    messages = [{"role": "user", "content": [part]}, CHAT[1]]
    with pytest.raises(ValueError, match="has images in its messages and in"):
        convert({"messages": messages, "image": "a.jpg"})


@pytest.mark.parametrize(
    "key, value", [("tool_calls", [{"id": 1}]), ("weight", 0), ("loss", False), ("reasoning_content", "hm")]
)
def test_keys_of_messages_that_change_the_training(key, value):
    messages = [CHAT[0], {**CHAT[1], key: value}]
    with pytest.raises(ValueError, match=f"message 1 has `{key}`, which is not supported"):
        convert({"messages": messages})
    harmless = [CHAT[0], {**CHAT[1], "tool_calls": None, "weight": 1, "loss": True, "name": "bot"}]
    assert convert({"messages": harmless}) == convert({"messages": CHAT})


def test_two_system_messages():
    row = {"messages": [{"role": "system", "content": "Be short."}, *CHAT]}
    assert convert({**row, "system": "Be short."}) == convert(row)
    with pytest.raises(ValueError, match="a column `system` and a different system message"):
        convert({**row, "system": "Be long."})


def test_swapped_columns_are_named():
    with pytest.raises(ValueError, match="row 3: the image is 'what is it .' and the question is 'a.png'.*swapped"):
        convert({"image": "what is it ?", "question": "a.png", "answer": "reply"})


def test_column_mapping():
    row = {"photo": "a.jpg", "second": "b.jpg", "ask": "q", "reply": "r"}
    assert apply_columns(row, {"image": "photo", "second": None})["image"] == "a.jpg"
    [one] = convert(row, columns={"images": ["photo", "second"], "question": "ask", "answer": "reply"})
    assert [image["path"] for image in one["images"]] == ["/images/a.jpg", "/images/b.jpg"]
    swapped = {"image": "q?", "question": "a.jpg", "answer": "r"}
    [one] = convert(swapped, columns={"image": "question", "question": "image"})
    assert one["images"][0]["path"] == "/images/a.jpg"


@pytest.mark.parametrize(
    "row, mapping",
    [
        ({"photo": "a.jpg", "ask": "What?", "reply": "cat"}, "image: photo, question: ask, answer: reply"),
        ({"img": b"\x89PNG", "user_query": "What?", "gold": "cat"}, "image: img, question: user_query, answer: gold"),
        ({"picture": "a.png", "description": "a cat"}, "image: picture, text: description"),
        ({"problem": "1+1", "solution": "2", "level": "1"}, "question: problem, answer: solution"),
    ],
)
def test_errors_suggest_a_mapping(row, mapping):
    with pytest.raises(ValueError, match="match no supported format") as error:
        convert(row)
    option = mapping.replace(": ", "=").replace(", ", ",")
    assert f"`columns: {{{mapping}}}` (`--columns {option}`)" in str(error.value)
    [one] = convert(row, columns=parse_columns(f"{option},level="))
    assert len(one["messages"]) == 2


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("image=photo,question=ask,answer=reply", {"image": "photo", "question": "ask", "answer": "reply"}),
        (" image = photo , note= ", {"image": "photo", "note": None}),
        ("images=left,images=right", {"images": ["left", "right"]}),
        ("{images: [left, right], note: null}", {"images": ["left", "right"], "note": None}),
    ],
)
def test_a_mapping_of_the_command_line(text, columns):
    assert parse_columns(text) == columns and parse_columns(None) is None
    assert convert_setting("columns", text, dict | None) == columns


@pytest.mark.parametrize("text", ["photo", "=photo", "{image: [", "image=a,image=b", "foto=photo", "{image: 3}", ""])
def test_an_invalid_mapping_of_the_command_line_is_named(text):
    with pytest.raises(ValueError, match="`columns`"):
        parse_columns(text)


def test_no_mapping_is_invented():
    assert suggest_columns({"a": 1, "b": 2.0}) == ""
