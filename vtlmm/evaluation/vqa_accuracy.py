# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VQA accuracy: compare an answer with the answers of ten annotators, as the two official programs do."""

import re


NUM_ANNOTATORS = 10
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
NUMBER_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # the official pattern has a look-behind that never matches
MAX_PERIODS = 32  # the official program passes a flag, worth 32, where `re` expects the number of replacements

# Words whose apostrophes the official table restores: it lists each word without one apostrophe
RIGHT_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in RIGHT_CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the official table


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_vqa_answer(text: str) -> str:
    """
    Return an answer in lower case without punctuation and articles, with digits for number words and with apostrophes.

    Rules: https://visualqa.org/evaluation.html. A punctuation mark is deleted if it is next to a space anywhere in the
    text, or if the text has a comma inside a number. Otherwise it becomes a space.
    """
    text = _one_line(text)
    plain, has_number_comma = text, NUMBER_COMMA.search(text)
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_blank or has_number_comma else " ")
    plain = PERIOD.sub("", plain, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_textvqa_answer(text: str) -> str:
    """
    Return [`normalize_vqa_answer`] of an answer in lower case, without `,` and `?`, and with a space before `'s`.

    Rules: the processor `evalai_answer` of https://github.com/facebookresearch/mmf. LLaVA also applies it to the
    answers that it submits for VQAv2 and VizWiz.
    """
    return normalize_vqa_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _agreement(answer: str, answers: list[str]) -> float:
    """Return the mean of min(1, agreeing annotators / 3) over all ways to leave out one annotator."""
    number, agreeing = len(answers), answers.count(answer)
    return (agreeing * min(3, agreeing - 1) + (number - agreeing) * min(3, agreeing)) / (3 * number)


def _check_ten(answers: list[str]) -> None:
    if len(answers) != NUM_ANNOTATORS:
        raise ValueError(
            f"VQA accuracy needs the answers of {NUM_ANNOTATORS} annotators, but there are {len(answers)} "
            f"({', '.join(map(repr, answers[:3]))}). Give all ten, or use the scorer exact."
        )


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    r"""
    Return the VQA accuracy of VQAv2 and VizWiz: 1 if at least three of nine annotators agree with the answer, averaged
    over all ways to leave out one of ten.

    Answers are normalized only if the annotators disagree: "Yes" compared with ten times "yes" scores 0.

    Source: Antol et al. 2015 (https://arxiv.org/abs/1505.00468), and https://visualqa.org/evaluation.html.

    Args:
        answer (`str`)
        answers (`list[str]`): answers of the ten annotators.

    Returns:
        `float`: 0, 0.3, 0.6, 0.9 or 1 by the number of annotators who agree.

    Raises:
        `ValueError`: if there are not ten answers.
    """
    _check_ten(answers)
    answer, answers = _one_line(answer), [_one_line(other) for other in answers]
    if len(set(answers)) > 1:
        answer, answers = normalize_vqa_answer(answer), [normalize_vqa_answer(other) for other in answers]
    return _agreement(answer, answers)


def textvqa_accuracy(answer: str, answers: list[str]) -> float:
    """
    Return the VQA accuracy of TextVQA. All answers are normalized by [`normalize_textvqa_answer`].

    Source: Singh et al. 2019 (https://arxiv.org/abs/1904.08920), and the evaluator of mmf that LLaVA uses.
    """
    _check_ten(answers)
    return _agreement(normalize_textvqa_answer(answer), [normalize_textvqa_answer(other) for other in answers])
