# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
Find out how a chat template puts the texts of a conversation together.

The template is applied to texts that record what it does with them. It may join and strip them, and test how they
start or end, what they contain and whether they are equal to a constant. Then every conversation of the same shape
with the same results of these tests is put together in the same way, without the template. Any other operation on a
text ends the trace, and the template is applied to each conversation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template


class NotTracedError(Exception):
    """The template did something with a text that cannot be repeated for other texts."""


class Strip(NamedTuple):
    """Joined pieces without white space, or other characters, at `method`'s sides."""

    method: str
    characters: str | None
    pieces: tuple


# A piece of a text is a constant, the number of a text of the conversation, a mark or a `Strip`
START, END = object(), object()


class Test(NamedTuple):
    """A test of joined pieces, and its result."""

    method: str
    pieces: tuple
    argument: Any
    result: bool


def join_pieces(pieces: tuple, texts: list[str]) -> str:
    """Return the text of pieces for the texts of a conversation."""
    return "".join(
        [
            piece if type(piece) is str
            else texts[piece] if type(piece) is int
            else "" if piece is START or piece is END
            else getattr(join_pieces(piece.pieces, texts), piece.method)(piece.characters)
            for piece in pieces
        ]
    )  # fmt: skip


TESTS: dict[str, Callable[[str, Any], bool]] = {
    "startswith": lambda text, argument: text.startswith(argument),
    "endswith": lambda text, argument: text.endswith(argument),
    "contains": lambda text, argument: argument in text,
    "equals": lambda text, argument: text == argument,
    "is true": lambda text, argument: bool(text),
}


class Plan(NamedTuple):
    """How texts are put together, and the tests whose results they must have."""

    tests: tuple[Test, ...]
    pieces: tuple

    def fits(self, texts: list[str]) -> bool:
        return all(TESTS[t.method](join_pieces(t.pieces, texts), t.argument) == t.result for t in self.tests)

    def render(self, texts: list[str]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the start and end of each marked answer."""
        written, position, spans, start = [], 0, [], 0
        for piece in self.pieces:
            if piece is START:
                start = position
            elif piece is END:
                spans.append((start, position))
            else:
                text = piece if type(piece) is str else texts[piece] if type(piece) is int else None
                text = join_pieces((piece,), texts) if text is None else text
                written.append(text)
                position += len(text)
        return "".join(written), spans


class Tracer:
    """The tests of one trace. `failed` is whether an operation was not traced; templates may catch the error."""

    def __init__(self) -> None:
        self.tests: dict[Test, None] = {}
        self.failed = False

    def fail(self, *args: Any, **kwargs: Any) -> Any:
        self.failed = True
        raise NotTracedError


class TracedText(str):
    """A text whose operations are recorded."""

    _pieces: tuple
    _tracer: Tracer

    def __new__(cls, value: str, pieces: tuple, tracer: Tracer) -> "TracedText":
        text = super().__new__(cls, value)
        text._pieces, text._tracer = pieces, tracer
        return text

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> "TracedText":
        return join_texts([self, other], self._tracer)

    def __radd__(self, other: Any) -> "TracedText":
        return join_texts([other, self], self._tracer)

    def _strip(self, method: str, characters: str | None) -> "TracedText":
        if not (characters is None or type(characters) is str):
            self._tracer.fail()
        value = getattr(str, method)(self, characters)
        return TracedText(value, (Strip(method, characters, self._pieces),), self._tracer)

    def strip(self, characters: str | None = None, /) -> "TracedText":
        return self._strip("strip", characters)

    def lstrip(self, characters: str | None = None, /) -> "TracedText":
        return self._strip("lstrip", characters)

    def rstrip(self, characters: str | None = None, /) -> "TracedText":
        return self._strip("rstrip", characters)

    def _test(self, method: str, argument: Any) -> bool:
        if type(argument) not in (str, type(None)):
            self._tracer.fail()
        result = TESTS[method](str.__str__(self), argument)
        self._tracer.tests[Test(method, self._pieces, argument, result)] = None
        return result

    def startswith(self, argument: Any, /) -> bool:  # type: ignore[override]
        return self._test("startswith", argument)

    def endswith(self, argument: Any, /) -> bool:  # type: ignore[override]
        return self._test("endswith", argument)

    def __contains__(self, argument: Any) -> bool:
        return self._test("contains", argument)

    def __eq__(self, argument: Any) -> bool:
        return self._test("equals", argument)

    def __ne__(self, argument: Any) -> bool:
        return not self._test("equals", argument)

    def __bool__(self) -> bool:
        return self._test("is true", None)

    def __hash__(self) -> int:
        return self._tracer.fail()


def _untraced(name: str) -> Callable:
    def method(self: TracedText, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.fail()

    method.__name__ = name
    return method


KEPT = {"__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__doc__", "__dir__"}
KEPT |= {"__init_subclass__", "__subclasshook__"}
for _name in set(dir(str)) - set(vars(TracedText)) - KEPT:
    setattr(TracedText, _name, _untraced(_name))


def join_texts(values: Any, tracer: Tracer) -> TracedText:
    """Return joined texts, some of which may be traced."""
    pieces: list[Any] = []
    plain = []
    for value in values:
        if type(value) is TracedText:
            pieces += value._pieces
            plain.append(str.__str__(value))
        elif type(value) is str:
            pieces.append(value)
            plain.append(value)
        else:
            tracer.fail()
    return TracedText("".join(plain), tuple(pieces), tracer)


# ---- Templates ----

# Filters and tests of Jinja that call methods of a text, or do not look at it
FILTERS = {"trim", "default", "d", "length", "count", "first", "last", "list", "items"}
JINJA_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "number", "boolean", "true", "false"}
JINJA_TESTS |= {"eq", "equalto", "==", "ne", "!="}


def holds_text(value: Any) -> bool:
    """Return whether a value is or contains a traced text."""
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    return type(value) is TracedText or (isinstance(value, list | tuple) and any(map(holds_text, value)))


class TracedTemplate:
    """
    A chat template in an environment that records operations on texts.

    Args:
        source (`str`): the template.
    """

    def __init__(self, source: str):
        self.tracer = Tracer()
        environment = _compile_jinja_template(source).environment.overlay()
        fail, join = self._fail, self._join
        environment.concat = join
        environment.filters = {n: f if n in FILTERS else self._guard(f) for n, f in environment.filters.items()}
        environment.tests = {n: f if n in JINJA_TESTS else self._guard(f) for n, f in environment.tests.items()}
        [marks] = [one for one in environment.extensions.values() if hasattr(one, "_generation_support")]
        marks._generation_support = lambda caller: join([self._mark(START), caller(), self._mark(END)])
        call, allowed = environment.call, ("dict", "namespace", "raise_exception")
        functions = [environment.globals[name] for name in allowed]

        def traced_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            is_allowed = any(function is one for one in functions) or type(function).__module__ == "jinja2.runtime"
            keyword_values = [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
            if not is_allowed and any(map(holds_text, (*args, *keyword_values))):
                fail()
            return call(context, function, *args, **kwargs)

        environment.call = traced_call
        tree = environment.parse(source)
        # `"%s" % (text,)` would format a text
        is_format = any(not isinstance(node.right, nodes.Const) for node in tree.find_all(nodes.Mod))
        if is_format or any(self._hides_text(node) for node in tree.find_all(nodes.Compare)):
            raise NotTracedError
        self.template = environment.from_string(tree)
        module = self.template.root_render_func.__globals__
        module["str_join"] = module["markup_join"] = lambda values: join([str(value) for value in values])

    def _fail(self) -> Any:
        return self.tracer.fail()

    def _join(self, values: Any) -> Any:
        values = list(values)
        return join_texts(values, self.tracer) if any(map(holds_text, values)) else "".join(values)

    def _mark(self, mark: object) -> TracedText:
        return TracedText("", (mark,), self.tracer)

    def _guard(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if any(map(holds_text, (*args, *kwargs.values()))):
                self.tracer.fail()
            return function(*args, **kwargs)

        return guarded

    @staticmethod
    def _hides_text(node: nodes.Compare) -> bool:
        """Return whether a comparison looks for a value, which may be a traced text, in a constant text."""
        left = node.expr
        return any(
            operand.op in ("in", "notin")
            and not isinstance(left, nodes.Const)
            and not isinstance(operand.expr, nodes.List | nodes.Tuple)
            for operand in node.ops
        )

    def plan(self, messages: list[dict], texts: list[str], constants: dict[str, Any]) -> Plan | None:
        r"""
        Return how the texts of a conversation are put together, None if that is unknown.

        Args:
            messages (`list[dict]`): the conversation. The text of a part is the number of one of `texts`.
            constants (`dict`): other variables of the template.
        """
        tracer = self.tracer = Tracer()

        def traced(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: traced(item) for key, item in value.items()}
            if isinstance(value, list):
                return [traced(item) for item in value]
            return TracedText(texts[value], (value,), tracer) if type(value) is int else value

        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **constants}
        try:
            blocks = list(self.template.generate(messages=traced(messages), **variables))
            pieces = join_texts(blocks, tracer)._pieces
        except Exception:  # templates raise any type of error
            return None
        return None if tracer.failed else Plan(tuple(tracer.tests), pieces)
