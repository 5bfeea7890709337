# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the server in the text format of Prometheus."""

from collections import Counter

from vtlmm.inference.scheduler import Scheduler


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(scheduler: Scheduler, statuses: Counter, seconds: Counter) -> str:
    r"""
    Return the metrics.

    Args:
        scheduler ([`Scheduler`])
        statuses (`Counter`): answers by `(path, status)`.
        seconds (`Counter`): `count` of finished chat completions, and the `sum` of their times in seconds.
    """
    lines = ["# HELP vtlmm_http_responses_total HTTP responses.", "# TYPE vtlmm_http_responses_total counter"]
    for (path, status), number in sorted(statuses.items()):
        lines.append(f'vtlmm_http_responses_total{{path="{path}",status="{status}"}} {number}')
    lines += ["# HELP vtlmm_request_seconds Time of chat completions.", "# TYPE vtlmm_request_seconds summary"]
    lines += [f"vtlmm_request_seconds_{name} {seconds[name]}" for name in ("count", "sum")]
    totals = scheduler.statistics
    for name, kind, text, value in (
        ("vtlmm_prompt_tokens_total", "counter", "Tokens of prompts with their images.", totals.prompt_tokens),
        ("vtlmm_generated_tokens_total", "counter", "Generated tokens.", totals.generated_tokens),
        ("vtlmm_decoding_steps_total", "counter", "Forward passes of the decoder.", totals.steps),
        ("vtlmm_images_encoded_total", "counter", "Images that the vision tower encoded.", totals.images_encoded),
        ("vtlmm_requests_cancelled_total", "counter", "Requests that were cancelled or timed out.", totals.cancelled),
        ("vtlmm_requests_waiting", "gauge", "Requests that wait for a place in the batch.", scheduler.num_waiting),
        ("vtlmm_answers_running", "gauge", "Answers in the running batch.", scheduler.num_running),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"
