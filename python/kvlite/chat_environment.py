"""The jinja2 environment that Hugging Face chat templates expect, in a sandbox that looks at the clock.

Owns filters, globals and extensions; knows neither messages nor tokens. jinja2 is imported at the first use. Called by
chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import jinja2


def environment(check_time: Callable[[], None]) -> jinja2.Environment:
    """Jinja as Hugging Face templates expect it: sandbox, loop controls, tojson, generation blocks.

    Whatever can repeat, loops and calls, runs `check_time`, which may raise.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.parser import Parser

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def call(self, /, *args: Any, **kwargs: Any) -> Any:
            check_time()
            return super().call(*args, **kwargs)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            template = super()._parse(source, name, filename)
            for loop in template.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "_timed", [], [], None, None, lineno=loop.lineno)
            template.set_environment(self)
            return template

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def timed(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            check_time()
            yield item

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    filters = cast("dict[str, Any]", made.filters)
    filters.update(tojson=tojson, _timed=timed)
    variables = cast("dict[str, Any]", made.globals)
    variables.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return made
