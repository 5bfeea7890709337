# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`/v1/chat/completions`: read the request, give it to the scheduler, send what the scheduler generates."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from vtlmm.inference.answer_text import TokenTexts
from vtlmm.inference.scheduler import GenerationRequest, Piece, QueueFullError, Scheduler

from .access import body_too_large
from .errors import RequestError, as_request_error
from .preparation import RequestPreparation, parse_chat_request, read_images
from .responses import Completion, event
from .schema import ChatRequest
from .settings import ServerSettings


_PREPARING_THREADS = 4
_FETCHING_THREADS = 64  # with remote images, most threads wait for other hosts
_BODY_SECONDS = 60.0


class _DisconnectedError(Exception):
    """The client closed the connection."""


class ChatCompletions:
    r"""
    Answer chat completions with one model.

    Args:
        name (`str`): the model's name in requests.
        model, processor: see [`load_model`].
        settings ([`ServerSettings`])
    """

    def __init__(self, name: str, model, processor, settings: ServerSettings):
        self.name, self.settings = name, settings
        self.scheduler = Scheduler(model, processor, settings.max_batch_size, settings.max_queue)
        self.preparation = RequestPreparation(model, processor, settings, self.scheduler.vision_features)
        self.token_texts = TokenTexts(processor.tokenizer)
        self.seconds: Counter = Counter()
        self._preparing = 0
        num_threads = _FETCHING_THREADS if settings.allow_remote_images else _PREPARING_THREADS
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")

    def close(self) -> None:
        """Stop the scheduler. Unfinished requests get status 503."""
        self.scheduler.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request) -> Response:
        r"""
        Return the response to a request.

        Raises:
            [`RequestError`]: if the request is invalid, or if the model fails.
        """
        try:
            return await self._answer(request)
        except (_DisconnectedError, ClientDisconnect):
            return Response(status_code=499)  # the client is gone; the number is for the metrics

    async def _answer(self, request: Request) -> Response:
        started = time.monotonic()
        body = await self._read_body(request, min(self.settings.request_seconds, _BODY_SECONDS))
        chat, generation = await self._prepare(body)
        events: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        generation.receive = _sender(asyncio.get_running_loop(), events)
        remaining = self.settings.request_seconds - (time.monotonic() - started)
        watcher = asyncio.create_task(_watch(request, generation, events, remaining))
        pieces = self._pieces(generation, events, watcher, started)
        try:
            self.scheduler.submit(generation)
            # The status of a stream is sent with its first text, so an earlier error can have its own status
            first = await anext(pieces)
            include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
            completion = Completion(self.name, generation, self.token_texts, include_usage)
            if chat.stream:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                stream = _stream(completion, first, pieces)
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
            return JSONResponse(completion.body([first, *[piece async for piece in pieces]]))
        except BaseException as error:  # also a cancelled task
            generation.cancel()
            watcher.cancel()
            if isinstance(error, Exception) and not isinstance(error, _DisconnectedError):
                raise as_request_error(error) from error
            raise

    async def _read_body(self, request: Request, seconds: float) -> bytes:
        async def read() -> bytes:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.settings.max_body_bytes:
                    raise body_too_large(self.settings)
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError as error:
            raise RequestError(f"The body did not arrive within {seconds:.0f} s.", 408) from error

    async def _prepare(self, body: bytes) -> tuple[ChatRequest, GenerationRequest]:
        """Check and encode a request outside the event loop, so that other requests continue."""
        if self._preparing + self.scheduler.num_waiting >= self.settings.max_queue:
            raise as_request_error(QueueFullError(f"{self.settings.max_queue} requests are waiting."))

        def prepare():
            chat = parse_chat_request(body, self.settings, self.name)
            return chat, self.preparation.prepare(chat, read_images(chat, self.settings))

        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, prepare)
        finally:
            self._preparing -= 1

    async def _pieces(
        self,
        generation: GenerationRequest,
        events: "asyncio.Queue[Piece | BaseException]",
        watcher: asyncio.Task,
        started: float,
    ) -> AsyncIterator[Piece]:
        """Yield what the scheduler generates. However this ends, the generation ends too."""
        num_finished = 0
        try:
            while num_finished < generation.num_answers:
                piece = await events.get()
                if isinstance(piece, BaseException):
                    raise piece
                num_finished += piece.finish_reason is not None
                yield piece
            self.seconds.update(count=1, sum=time.monotonic() - started)  # type: ignore[call-overload]
        finally:
            generation.cancel()
            watcher.cancel()


def _sender(loop: asyncio.AbstractEventLoop, events: asyncio.Queue):
    """Return a function that puts an event of the scheduler's thread into a queue of the event loop."""

    def send(piece: Piece | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(events.put_nowait, piece)

    return send


async def _watch(request: Request, generation: GenerationRequest, events: asyncio.Queue, seconds: float) -> None:
    """Cancel the generation when the client disconnects, or when the time of the request is over."""
    error: Exception = _DisconnectedError()
    try:
        await asyncio.wait_for(_disconnected(request), max(seconds, 0))
    except asyncio.TimeoutError:
        error = TimeoutError("The answer took longer than the time limit of a request.")
    generation.cancel()
    events.put_nowait(error)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(completion: Completion, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    try:
        yield completion.start() + completion.chunk(first)
        async for piece in pieces:
            yield completion.chunk(piece)
        yield completion.end()
    except _DisconnectedError:
        pass
    except Exception as error:  # the status was sent already
        yield event(as_request_error(error).body)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
