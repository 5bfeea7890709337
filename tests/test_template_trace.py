# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Plans of chat templates: the same text and answers as the template, and no plan for what cannot be traced."""

import itertools

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vtlmm.data.template_trace import NotTracedError, TracedTemplate
from vtlmm.hub.chat_templates import load_template


TEXTS = ["red", " red ", "\nred", "red\n", "\x1fred\u2003", "<think>", "a <think> b", "漢", "{{ 1 }}", "Q", "\ufdd0"]
LOOP = "{%% for m in messages %%}{%% set text = m.content[0].text %%}%s{%% endfor %%}"
ANSWER = "{% generation %}{{ text }}{% endgeneration %}"
TRACED = [
    "{{ 'Q: ' + text + eos_token }}" + ANSWER,
    "{{ (' ' + text) | trim }}" + ANSWER + "{{ text.rstrip('d') }}",
    "{{ text if '<think>' in text else text.strip() }}" + ANSWER,
    "{% if text.startswith('\n') or text.endswith('d') %}{{ m.role ~ ':' ~ text }}{% endif %}" + ANSWER,
    "{% set whole %}<{{ text }}>{% endset %}{{ whole | trim }}{% if 'a' in whole %}!{% endif %}" + ANSWER,
    "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(text) }}" + ANSWER,
    "{{ 'is Q' if text == 'Q' else 'is not Q' }}{{ loop.index0 % 2 }}" + ANSWER,
    "{% if text in ['Q', 'red'] %}{{ text }}{% endif %}" + ANSWER,
    "{% set ns = namespace(all='') %}{% set ns.all = ns.all + text %}{{ ns.all }}" + ANSWER,
    "{{ text | default('none', true) }}{{ dict(m, a=text).a }}" + ANSWER,
]
UNTRACED = [
    "{{ text | length }}",
    "{{ text | upper }}",
    "{{ text.split('e') | length }}",
    "{{ text[1:] }}",
    "{{ text in 'redQ' }}",
    "{{ 'redQ'.startswith(text) }}",
    "{{ 'xRED'.replace('x', text) }}",
    "{{ 'xRED' | replace('x', text) }}",
    "{{ [text] | join }}",
    "{{ m | tojson }}",
    "{{ '%s' % text }}",
    "{{ '%s' % (text,) }}",
    "{{ '%s' | format(text) }}",
    "{{ '{}'.format(text) }}",
    "{{ text is sequence }}",
    "{{ text is in 'redQ' }}",
    "{{ text < 'b' }}",
    "{{ {'red': 1}[text] }}",
    "{% for letter in text %}{{ letter }}{% endfor %}",
    "{{ text * 2 }}",
    "{{ text | e }}",
    "{{ text == messages[-1].content[0].text }}",
    "{% set whole = text ~ 'a' %}{{ whole | length }}",
]


def rendered(template, texts, role="user"):
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for text in texts]
    all_texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, eos_token="</s>"
    )
    return all_texts[0], spans[0]


def numbered(num_texts, role="user"):
    return [{"role": role, "content": [{"type": "text", "text": i}]} for i in range(num_texts)]


@pytest.mark.parametrize("template", [LOOP % body for body in TRACED])
def test_a_plan_gives_the_text_of_the_template(template):
    traced, plans = TracedTemplate(template), []
    for texts in itertools.product(TEXTS, repeat=2):
        fitting = [plan for plan in plans if plan.fits(list(texts))]
        if not fitting:
            plans.append(traced.plan(numbered(2), list(texts), {"eos_token": "</s>"}))
            fitting = plans[-1:]
        for plan in fitting:
            assert plan.render(list(texts)) == rendered(template, texts)
    assert len(plans) < 30


@pytest.mark.parametrize("template", [LOOP % body for body in UNTRACED])
def test_no_plan_for_what_looks_into_a_text(template):
    try:
        traced = TracedTemplate(template)
    except NotTracedError:
        return
    assert traced.plan(numbered(2), ["red", "Q"], {}) is None


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral"])
def test_templates_of_the_release_have_few_plans(name):
    traced, plans, roles = TracedTemplate(load_template(name)), [], ["user", "assistant"] * 2
    messages = [{**message, "role": role} for message, role in zip(numbered(4), roles, strict=True)]
    for i in range(len(TEXTS)):
        texts = [TEXTS[(i * k) % len(TEXTS)] for k in (1, 2, 3, 5)]
        if not any(plan.fits(texts) for plan in plans):
            plans.append(traced.plan(messages, texts, {"eos_token": "</s>"}))
        [plan] = [plan for plan in plans if plan.fits(texts)]
        parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in zip(roles, texts, strict=True)]
        expected = render_jinja_template(
            [parts], chat_template=load_template(name), return_assistant_tokens_mask=True, eos_token="</s>"
        )
        assert plan.render(texts) == (expected[0][0], expected[1][0])
    assert len(plans) < 5
