# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer requests of several clients in one batch that changes at each step. One thread owns the model."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .answer_text import AnswerText
from .batch_inputs import VisionFeatures, encoded_inputs
from .decoding_batch import DecodingBatch, start_batch
from .sampling import RowSampler, Sampling, TokenLogprob, choose_tokens, token_logprobs


logger = logging.getLogger(__name__)

# Bounds the memory of the forward pass of new prompts. A longer prompt is alone in its pass.
MAX_PREFILL_TOKENS = 16_384
# A model whose batch cannot grow waits this long for more requests before it starts one.
BATCH_WINDOW = 0.005  # seconds

T = TypeVar("T")


class QueueFullError(RuntimeError):
    """Too many requests wait for the model."""


class ClosedError(RuntimeError):
    """The scheduler does not accept or finish requests any more."""


@dataclass(frozen=True)
class Piece:
    """New text of the answer with number `index`. `finish_reason` is `"stop"` or `"length"` in its last piece."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None = None
    num_tokens: int = 0


@dataclass(eq=False)
class GenerationRequest:
    r"""
    A prompt to be answered.

    Args:
        token_ids (`list[int]`): from [`encode_prompt`], with one image token for each image.
        image_keys (`list[str]`): image keys in the order of the image tokens.
        images (`dict`): images by key, see [`image_inputs`].
        num_tokens (`int`): length of the prompt with its image features.
        max_new_tokens (`int`): longest answer in tokens.
        receive (`Callable`): is called in the scheduler's thread with each [`Piece`], or once with an exception.
        sampling ([`Sampling`]): how tokens are chosen; greedy by default.
        num_answers (`int`): answers to generate.
        stop (`tuple[str, ...]`): an answer ends before the first of these strings.
        num_logprobs (`int`, *optional*): return log probabilities, with this number of alternatives.
        is_streamed (`bool`): pass on each new text. Otherwise each answer is one piece.
        use_pseudo_image_features (`bool`, *optional*): what the decoder reads; by default as the model's
            config says when the scheduler starts.
    """

    token_ids: list[int]
    image_keys: list[str]
    images: dict[str, Any]
    num_tokens: int
    max_new_tokens: int
    receive: Callable[[Piece | BaseException], None]
    sampling: Sampling = Sampling()
    num_answers: int = 1
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    is_streamed: bool = False
    use_pseudo_image_features: bool | None = None
    is_cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Stop the generation before the next step. At most the pieces of the current step are received afterwards."""
        self.is_cancelled = True


@dataclass
class _Row:
    """One answer in the running batch."""

    request: GenerationRequest
    index: int
    sampler: RowSampler
    text: AnswerText
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Statistics:
    """Totals since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    cancelled: int = 0
    images_encoded: int = 0


class Scheduler:
    r"""
    Generate the answers of requests in batches. [`submit`] may be called from any thread.

    Args:
        model, processor: see [`load_model`].
        max_rows (`int`): answers in the running batch.
        max_waiting (`int`): requests that wait for a place in it.
        max_images (`int`): images whose vision features are kept in memory.
    """

    def __init__(self, model, processor, max_rows: int = 32, max_waiting: int = 128, max_images: int = 256):
        self.model, self.processor = model, processor
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.vision_features = VisionFeatures(max_images)
        self.statistics = Statistics()
        ends = model.generation_config.eos_token_id
        # None for a model without this setting, e.g. LLaVA
        self._use_pseudo_image_features = getattr(model.config, "use_pseudo_image_features", None)
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._waiting: deque[GenerationRequest] = deque()
        self._calls: deque[tuple[Future, Callable]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._rows: list[_Row] = []
        self._batch: DecodingBatch | None = None
        # Properties of the model that its first batch shows
        self._can_join, self._needs_history = True, False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        r"""
        Add a request.

        Raises:
            [`QueueFullError`]: if `max_waiting` requests wait already.
            [`ClosedError`]: after [`close`].
            `ValueError`: if the request has more answers than fit into the batch.
        """
        if request.num_answers > self.max_rows:
            raise ValueError(f"{request.num_answers} answers are more than the maximum of {self.max_rows}.")
        with self._changed:
            if self._is_closed:
                raise ClosedError("The server is shutting down.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests are waiting.")
            self._waiting.append(request)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function that uses the model between two steps, and return its result."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise ClosedError("The server is shutting down.")
            self._calls.append((future, function))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Stop after the current step. Unfinished requests receive [`ClosedError`]."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    # ---- The thread of the model ----

    def _run(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            while not self._is_closed:
                try:
                    self._run_calls()
                    new = self._take_requests()
                    if new:
                        self._start(new)
                    if self._rows:
                        self._step()
                except Exception as error:  # e.g. out of memory: the requests fail, the server continues
                    logger.warning("A batch failed", exc_info=error)
                    self._fail_all(error)
        closed = ClosedError("The server is shutting down.")
        self._fail_all(closed)
        for request in self._waiting:
            _fail(request, closed)
        self._waiting.clear()
        for future, _ in self._calls:
            future.set_exception(closed)

    def _run_calls(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        for request in {id(row.request): row.request for row in self._rows}.values():
            _fail(request, error)
        self._rows, self._batch = [], None

    def _take_requests(self) -> list[GenerationRequest]:
        """Return requests that can start now. Wait for one if nothing runs."""
        with self._changed:
            if not self._rows:
                self._changed.wait_for(lambda: self._waiting or self._calls or self._is_closed)
                if not self._can_join:
                    self._changed.wait_for(lambda: self._is_closed, BATCH_WINDOW)
            elif not self._can_join:
                return []
            for request in [each for each in self._waiting if each.is_cancelled]:
                self._waiting.remove(request)
                self.statistics.cancelled += 1
            new: list[GenerationRequest] = []
            num_rows, longest = len(self._rows), 0
            while self._waiting and not self._is_closed:
                request = self._waiting[0]
                longest = max(longest, request.num_tokens)
                num_rows += request.num_answers
                if num_rows > self.max_rows or (new and longest * (len(new) + 1) > MAX_PREFILL_TOKENS):
                    break
                if new and request.use_pseudo_image_features != new[0].use_pseudo_image_features:
                    break  # the kind of image features is a setting of the model
                if new and self._needs_history:
                    break  # `generate` builds one set of logits processors per batch, which cannot be split by row
                new.append(self._waiting.popleft())
            return new

    def _start(self, requests: list[GenerationRequest]) -> None:
        """Compute the prompts of new requests, and add a row for each of their answers to the batch."""
        try:
            batch = self._first_step(requests)
        except Exception as error:
            if len(requests) > 1:  # the other requests must not fail because of one
                self._start_separately(requests)
            else:
                logger.warning("A request failed", exc_info=error)
                _fail(requests[0], error)
            return
        self._can_join, self._needs_history = batch.can_join, batch.needs_history
        if self._needs_history and len(requests) > 1:
            self._start_separately(requests)
            return
        self.statistics.prompt_tokens += sum(request.num_tokens for request in requests)
        self._rows = self._rows + [
            _Row(request, i, RowSampler(request.sampling, i), AnswerText(self.processor.tokenizer, request.stop))
            for request in requests
            for i in range(request.num_answers)
        ]
        for request in requests:
            request.images = {}  # frees the pixels
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def _start_separately(self, requests: list[GenerationRequest]) -> None:
        remaining = deque(requests)
        try:
            while remaining and (self._can_join or not self._rows):
                self._start([remaining.popleft()])
        finally:  # the running batch fails if a request cannot join it; the remaining requests must not be lost
            with self._changed:
                self._waiting.extendleft(reversed(remaining))

    def _first_step(self, requests: list[GenerationRequest]) -> DecodingBatch:
        images = {key: image for request in requests for key, image in request.images.items()}
        known = sum(key in self.vision_features for key in images)
        use_pseudo = requests[0].use_pseudo_image_features
        if use_pseudo is None:
            use_pseudo = self._use_pseudo_image_features
        if use_pseudo is not None:  # earlier requests may have changed the config
            self.model.config.use_pseudo_image_features = use_pseudo
        inputs = encoded_inputs(
            self.model,
            self.processor,
            [request.token_ids for request in requests],
            [request.image_keys for request in requests],
            images.__getitem__,
            self.vision_features,
        )
        self.statistics.images_encoded += len(images) - known
        batch = start_batch(self.model, inputs, max(request.max_new_tokens for request in requests))
        batch.select([i for i, request in enumerate(requests) for _ in range(request.num_answers)])
        return batch

    def _step(self) -> None:
        """Choose a token for each row, send what is new, and compute the logits of the rows that continue."""
        batch = self._batch
        assert batch is not None
        cancelled = {id(row.request) for row in self._rows if row.request.is_cancelled}
        if cancelled:
            self.statistics.cancelled += len(cancelled)
            self._keep([i for i, row in enumerate(self._rows) if not row.request.is_cancelled])
        if not self._rows:
            return
        tokens = choose_tokens(batch.scores(), [row.sampler for row in self._rows])
        logprobs = token_logprobs(batch.logits, tokens, [row.request.num_logprobs for row in self._rows])
        pairs = zip(self._rows, tokens, logprobs, strict=True)
        going = [i for i, (row, token, logprob) in enumerate(pairs) if self._add_token(row, token, logprob)]
        self._keep(going)
        if going:
            batch.step(self.model, [tokens[i] for i in going])
        self.statistics.steps += 1

    def _add_token(self, row: _Row, token: int, logprob: TokenLogprob | None) -> bool:
        """Add a token to an answer. Return whether the answer continues."""
        request, text, reason = row.request, row.text, None
        if token in self._ends:
            reason = "stop"
        else:
            text.tokens.append(token)
            self.statistics.generated_tokens += 1
            if logprob is not None:
                row.logprobs.append(logprob)
            if request.is_streamed or request.stop:
                text.decode()
            if text.is_stopped:
                reason = "stop"
            elif len(text.tokens) >= request.max_new_tokens:
                reason = "length"
        piece = ""
        if request.is_streamed:
            piece = text.new_text()
        if reason:
            piece += text.finish()
            if text.is_stopped:  # the last token may have completed a stop string
                reason = "stop"
        if piece or reason:
            logprobs, row.logprobs = row.logprobs, []
            request.receive(Piece(row.index, piece, logprobs, reason, len(text.tokens)))
        return reason is None

    def _keep(self, rows: list[int]) -> None:
        """Keep some rows of the batch."""
        self._rows = [self._rows[i] for i in rows]
        if not rows:
            self._batch = None
        elif self._batch is not None:
            self._batch.select(rows)


def _fail(request: GenerationRequest, error: BaseException) -> None:
    if not request.is_cancelled:
        request.receive(error)
