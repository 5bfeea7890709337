# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compare the collator with a slow implementation, and read its labels back as words."""

import pickle

import pytest
import torch
from helpers.tiny_models import WORDS, build_processor
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaImageProcessorPil, PreTrainedTokenizerFast

from vtlmm.data.encoding import encode_messages
from vtlmm.data.rows import load_rows
from vtlmm.hub.chat_templates import load_template
from vtlmm.train.collator import VTLMMCollator


BOS, EOS, PAD = 1, 2, 3


def parts(text):
    """`■` is an image."""
    pieces = [("image", None) if piece == "■" else ("text", piece) for piece in text.split("|")]
    # a loaded dataset fills keys with None
    return [{"type": kind, "text": text, "image": None} for kind, text in pieces]


def row(*texts, images=(), num_context_messages=0):
    messages = [{"role": ("user", "assistant")[i % 2], "content": parts(text)} for i, text in enumerate(texts)]
    return {"messages": messages, "images": list(images), "num_context_messages": num_context_messages}


def make_image(color="red", mode="RGB", size=(40, 30)):
    return Image.new("RGB", size, color).convert(mode)


ROWS = [
    row("■|what is in the image ?", "a red square", images=[make_image()]),
    row("hello", "hello there", "what color ?", "red and blue", "no", "yes"),
    row("■|left|■|right", "two", "■", "one boat", images=[make_image(c) for c in ("red", "blue", "green")]),
    row("what ?", "no", "■|what color ?", "blue", images=[make_image("blue")], num_context_messages=3),
]


def slow_collate(processor, rows):
    """Encode word by word for the template of `conftest`. Shares no code with the collator."""

    def words(text):
        return processor.tokenizer.encode(text, add_special_tokens=False)

    sequences, images = [], []
    for item in rows:
        ids, labels = [BOS], [-100]
        for i, message in enumerate(item["messages"]):
            if message["role"] == "user":
                new = words("USER :")
                for part in message["content"]:
                    new += [processor.image_token_id] * 4 if part["type"] == "image" else words(part["text"])
                new += words("ASSISTANT :")
                ids, labels = ids + new, labels + [-100] * len(new)
            else:
                new = [*words(message["content"][0]["text"]), EOS]
                ids = ids + new
                labels = labels + (new if i >= item["num_context_messages"] else [-100] * len(new))
        sequences.append((ids, labels))
        for image in item["images"]:
            images.append(processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"])
    length = max(len(ids) for ids, _ in sequences)
    batch = {
        "input_ids": [ids + [PAD] * (length - len(ids)) for ids, _ in sequences],
        "attention_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in sequences],
        "labels": [labels + [-100] * (length - len(labels)) for _, labels in sequences],
    }
    return {**{key: torch.tensor(value) for key, value in batch.items()}, "pixel_values": torch.cat(images)}


def collate_by_template(processor, rows):
    """Encode as the processor does for generation: image marks are repeated before tokenization."""
    conversations = []
    for item in rows:
        images = iter(item["images"])
        conversations.append(
            [
                {
                    "role": message["role"],
                    "content": [
                        {"type": "image", "image": next(images).convert("RGB")}
                        if part["type"] == "image"
                        else {"type": "text", "text": part["text"]}
                        for part in message["content"]
                    ],
                }
                for message in item["messages"]
            ]
        )
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    supervised = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return {**batch, "labels": torch.where(supervised, batch["input_ids"], -100)}


def assert_equal_batches(batch, expected):
    assert set(batch) == set(expected)
    for key, tensor in expected.items():
        assert batch[key].dtype == tensor.dtype and torch.equal(batch[key], tensor), key


def supervised_words(processor, labels):
    """Return the decoded runs of supervised tokens of one row."""
    runs, last = [], -100
    for label in labels.tolist():
        if label != -100:
            runs = runs + [[label]] if last == -100 else [*runs[:-1], [*runs[-1], label]]
        last = label
    return [processor.tokenizer.decode(run) for run in runs]


def test_equals_slow_collator(processor):
    assert_equal_batches(VTLMMCollator(processor)(ROWS), slow_collate(processor, ROWS))


@pytest.mark.parametrize("template", ["conftest", "vicuna_v1", "mistral", "with BOS"])
def test_equals_the_processor(template):
    processor = build_processor()
    if template == "with BOS":
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    elif template != "conftest":
        processor.chat_template = load_template(template)
    rows = [item for item in ROWS if not item["num_context_messages"]]
    batch = VTLMMCollator(processor)(rows)
    assert_equal_batches(batch, collate_by_template(processor, rows))
    assert (batch["input_ids"] == BOS).sum(1).tolist() == [1] * len(rows)


def test_labels_are_the_answers(processor):
    labels = VTLMMCollator(processor)(ROWS)["labels"]
    assert [supervised_words(processor, line) for line in labels] == [
        ["a red square </s>"],
        ["hello there </s>", "red and blue </s>", "yes </s>"],
        ["two </s>", "one boat </s>"],
        ["blue </s>"],
    ]


def test_tokens_that_are_never_supervised(processor):
    # an answer that shows a image
    rows = [*ROWS, row("what ?", "yes", images=[make_image()])]
    rows[-1]["messages"][1]["content"] = parts("yes|■")
    template = processor.chat_template.replace("message['content'][0]['text']", "'yes <image>'")
    own = build_processor()
    own.chat_template = template
    for collator, batch in ((VTLMMCollator(processor), ROWS), (VTLMMCollator(own), rows[-1:])):
        batch = collator(batch)
        targets = batch["input_ids"][batch["labels"] != -100]
        assert len(targets) and not torch.isin(targets, torch.tensor([BOS, PAD, processor.image_token_id])).any()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert (batch["input_ids"][:, 0] == BOS).all()


def test_text_only_batch_and_padding(processor):
    batch = VTLMMCollator(processor, pad_to_multiple_of=16)([row("hello", "yes"), ROWS[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape[1] % 16 == 0
    lengths = batch["attention_mask"].sum(1)
    for ids, mask, length in zip(batch["input_ids"], batch["attention_mask"], lengths, strict=True):
        assert mask[:length].all() and (ids[length:] == PAD).all()


def test_images_of_all_kinds(processor):
    """Images are in the order of the rows, of every mode, and float32."""
    colors = ["red", "green", "blue"]
    rows = [row("■", "yes", images=[make_image(c)]) for c in colors]
    rows += [row("■|■", "yes", images=[make_image("white", "L"), make_image("white", "RGBA", size=(30, 90))])]
    pixel_values = VTLMMCollator(processor)(rows)["pixel_values"]
    assert pixel_values.shape == (5, 3, 28, 28) and pixel_values.dtype == torch.float32
    assert pixel_values[:3].mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    assert torch.allclose(pixel_values[3], pixel_values[4])
    own = build_processor()
    own.image_processor.do_convert_rgb = False
    assert torch.equal(VTLMMCollator(own)(rows)["pixel_values"], pixel_values)


@pytest.mark.parametrize("pad", [False, True])
def test_other_image_processors(processor, pad):
    """The number of image tokens comes from the images, not from the config."""
    side = {"height": 42, "width": 42}
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": 42}, crop_size=side, do_pad=pad)
    if not pad:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=side)
    own = build_processor()
    own.image_processor = image_processor
    batch = VTLMMCollator(own)(ROWS[:1])
    assert batch["pixel_values"].shape == (1, 3, 42, 42)
    assert (batch["input_ids"] == own.image_token_id).sum() == 9


def test_keys_that_a_loaded_dataset_fills_with_none():
    """Templates of other models ask whether a part has the key `image` or `text`, not what its type is."""
    own = build_processor()
    own.chat_template = own.chat_template.replace("part['type'] == 'image'", "'text' not in part")
    expected = VTLMMCollator(build_processor())(ROWS)
    assert_equal_batches(VTLMMCollator(own)(ROWS), expected)


def test_rows_are_not_changed(processor):
    before = pickle.dumps([item["messages"] for item in ROWS])
    VTLMMCollator(processor)(ROWS)
    assert pickle.dumps([item["messages"] for item in ROWS]) == before


def test_token_that_crosses_the_mark(processor):
    """A word that is partly in the answer is supervised, as in transformers."""
    own = build_processor()
    own.chat_template = own.chat_template.replace("' ASSISTANT :'", "' ASSISTANT : re'").replace("{{ ' ' +", "{{")
    _, supervised = encode_messages(own, row("what ?", "d")["messages"])
    ids, _ = encode_messages(own, row("what ?", "d")["messages"])
    assert own.tokenizer.decode(ids[supervised]) == "red </s>"


def broken(kind):
    item = row("■|what ?", "yes", images=[make_image()])
    if kind == "too long":
        item["messages"][1]["content"] = parts("yes " * 50)
    elif kind == "more marks":
        item["messages"][0]["content"] = parts("■|■|what ?")
    elif kind == "more images":
        item["images"] *= 2
    elif kind == "no marks":
        item["messages"][0]["content"] = parts("what ?")
    elif kind == "no target":
        item["num_context_messages"] = 2
    elif kind == "BOS":
        item["messages"][0]["content"] = parts("■|what <s> ?")
    elif kind == "role":
        item["messages"][0]["role"] = "tool"
    return item


@pytest.mark.parametrize(
    "kind, message",
    [
        ("too long", "more than max_length=40"),
        ("more marks", "2 image placeholders and 1 images"),
        ("more images", "1 image placeholders and 2 images"),
        ("no marks", "0 image placeholders and 1 images"),
        ("no target", "has no supervised token"),
        ("BOS", "the BOS token '<s>' occurs in the text"),
        ("role", "unknown role tool"),
    ],
)
def test_errors_name_the_row(processor, tmp_path, kind, message):
    item = broken(kind)
    file = tmp_path / "boat.png"
    item["images"][0].save(file)
    item["images"][0] = Image.open(file)
    with pytest.raises(ValueError) as error:
        VTLMMCollator(processor, max_length=40)([ROWS[0], item])
    assert message in str(error.value)
    assert "begins 'what" in str(error.value) and "boat.png" in str(error.value)


def test_row_of_max_length_is_kept(processor):
    length = VTLMMCollator(processor)(ROWS[:1])["input_ids"].shape[1]
    assert VTLMMCollator(processor, max_length=length)(ROWS[:1])["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match="Rows are never truncated"):
        VTLMMCollator(processor, max_length=length - 1)(ROWS[:1])


def test_templates_that_cannot_supervise():
    own = build_processor()
    marked = own.chat_template
    for template in (None, marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        own.chat_template = template
        with pytest.raises(ValueError, match="does not mark the answers"):
            VTLMMCollator(own)
    own.chat_template = marked.replace(" + eos_token", " + ' '")
    with pytest.raises(ValueError, match="no end-of-turn token"):
        VTLMMCollator(own)
    own.chat_template = marked.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(ValueError, match="marks 1 answers of 3"):
        VTLMMCollator(own)([ROWS[1]])


def test_a_token_that_ends_after_the_mark_is_not_supervised():
    """A SentencePiece tokenizer includes the space before a word in the token of the word."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁USER", "▁:", "▁ASSISTANT", "▁red", "▁what", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    own = build_processor()
    own.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    own.chat_template = own.chat_template.replace("{% endgeneration %}{{ ' ' }}", "{{ ' ' }}{% endgeneration %}")
    input_ids, supervised = encode_messages(own, row("what", "red", "what", "red")["messages"])
    words = own.tokenizer.convert_ids_to_tokens(input_ids)
    assert words == ["▁USER", "▁:", "▁what", "▁ASSISTANT", "▁:", "▁red", "</s>"] * 2 + ["▁"]
    targets = [word for word, is_target in zip(words, supervised, strict=True) if is_target]
    assert targets == ["▁red", "</s>", "▁red", "</s>", "▁"]


def test_an_end_of_turn_with_a_line_break_is_supervised():
    """The end-of-turn token of Phi-3 extends past the mark."""
    own = build_processor()
    own.tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", rstrip=True, special=True)})
    own.chat_template = own.chat_template.replace("{% endgeneration %}{{ ' ' }}", "{% endgeneration %}{{ '\n' }}")
    VTLMMCollator(own)
    input_ids, supervised = encode_messages(own, ROWS[1]["messages"])
    assert (input_ids[supervised] == own.tokenizer.eos_token_id).sum() == 3


def test_unknown_words_are_not_an_end_of_turn():
    own = build_processor()
    words = {word: i for word, i in own.tokenizer.get_vocab().items() if word != "answer"}
    own.tokenizer.backend_tokenizer.model = models.WordLevel(words, unk_token="<unk>")
    own.chat_template = own.chat_template.replace(" + eos_token", "")
    with pytest.raises(ValueError, match="no end-of-turn token"):
        VTLMMCollator(own)


def test_dataloader_workers(processor):
    collator = VTLMMCollator(processor, max_length=60, pad_to_multiple_of=8)
    copy = pickle.loads(pickle.dumps(collator))
    assert_equal_batches(copy(ROWS), collator(ROWS))
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, num_workers=1, collate_fn=collator)
    for batch, rows in zip(loader, (ROWS[:2], ROWS[2:]), strict=True):
        assert_equal_batches(batch, collator(rows))


@pytest.mark.parametrize("name", ["easy_vqa/test.parquet", "llava_pretrain_2k/chat.json"])
def test_shared_rows(shared, name):
    """Unknown words are one token each, so the slow implementation still applies."""
    processor = build_processor()
    folder = shared / "data/llava_pretrain_2k/images"
    rows = list(load_rows(shared / "data" / name, image_folder=folder, max_rows=6))
    batch = VTLMMCollator(processor)(rows)
    assert_equal_batches(batch, collate_by_template(processor, rows))
    known = [supervised_words(processor, line) for line in batch["labels"]]
    for item, answers in zip(rows, known, strict=True):
        expected = [m["content"][0]["text"] for m in item["messages"] if m["role"] == "assistant"]
        assert len(answers) == len(expected)
        for answer, text in zip(answers, expected, strict=True):
            assert answer.endswith(" </s>")
            if text in WORDS:
                assert answer == f"{text} </s>"


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral"])
def test_sentencepiece_tokenizer(shared, template):
    """A Llama tokenizer with spaces in its tokens and byte fallback."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "weights/stories260k")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    own = build_processor()
    own.tokenizer, own.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<image>")
    own.chat_template = load_template(template)
    rows = [
        row("■|What is it?", " A boat…", "■|■|Why?", "日本 (one)\n- two", images=[make_image()] * 3),
        row("Hello", "Hello there."),
    ]
    batch = VTLMMCollator(own)(rows)
    assert_equal_batches(batch, collate_by_template(own, rows))
    answers = supervised_words(own, batch["labels"][0])
    assert [answer.strip() for answer in answers] == ["A boat…</s>", "日本 (one)\n- two</s>"]
