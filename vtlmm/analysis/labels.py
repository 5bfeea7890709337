# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The labels of each image of a dataset, from its answers or from a column."""

from dataclasses import dataclass, field


Box = list[float]  # [left, top, right, bottom] in pixels


@dataclass
class Labels:
    """Labels or captions of one image (`texts`), and the boxes of each label that has some."""

    texts: list[str] = field(default_factory=list)
    boxes: dict[str, list[Box]] = field(default_factory=dict)

    def add(self, text: str, box: Box | None = None) -> None:
        """Add a label, and its box if there is one. Duplicates are ignored."""
        if text not in self.texts:
            self.texts.append(text)
        if box is not None and box not in self.boxes.setdefault(text, []):
            self.boxes[text].append(box)


def read_labels(questions: list[dict], from_column: bool) -> dict[str, Labels]:
    r"""
    Collect the labels of every image over all rows that contain it.

    Args:
        questions (`list[dict]`): Questions from [`~vtlmm.evaluation.questions.read_questions`], with the label column
            as `id`.
        from_column (`bool`): Read the labels from that column instead of the answers. A value is a text, a list of
            texts, or a list of `{"label", "bbox"}` with `bbox` as `[left, top, right, bottom]` in pixels.

    Returns:
        `dict[str, Labels]`: Image key to its labels.

    Raises:
        ValueError: If a value of the column has another form.
    """
    images: dict[str, Labels] = {}
    for question in questions:
        entries = question["id"] if from_column else question["answer"]
        if not isinstance(entries, list):
            entries = [] if entries is None else [entries]
        for key in question["images"]:
            labels = images.setdefault(key, Labels())
            for entry in entries:
                if isinstance(entry, str):
                    labels.add(entry)
                elif isinstance(entry, dict) and isinstance(entry.get("label"), str):
                    labels.add(entry["label"], entry.get("bbox"))
                else:
                    raise ValueError(
                        f"The row with the question {question['question'][:60]!r} has the label {entry!r}. A label "
                        "must be a text, or an object with `label` and, optionally, `bbox`."
                    )
    return images
