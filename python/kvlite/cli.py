"""The command `kvlite`: serve, fleet, chat, batch, demo.

Owns flags (derived from EngineConfig, never written twice), exit codes (0 fine, 1 could not, 2 usage) and the rule that
a user sees one clear line, not a traceback. Imports nothing heavy before a command runs, so that --help is instant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlite.config import EngineConfig, Scope, Setting, env_name, flag_name, setting_of
from kvlite.errors import ConfigError, KvliteError
from kvlite.fleet.settings import ENGINES_MAX, FleetSettings

if TYPE_CHECKING:
    from collections.abc import Generator

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="kvlite", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; `arguments` default to those of the process."""
    app(arguments)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvlite {metadata.version('kvlite')}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A minimal LLM serving engine that treats KV cache as the product."""


@contextmanager
def _one_line_errors() -> Generator[None]:
    """What the user caused ends in one line on stderr and an exit status."""
    try:
        yield
    except ConfigError as error:
        settings = {item.name for kind in (EngineConfig, FleetSettings) for item in fields(kind)}
        flag = flag_name(error.field) if error.field in settings else error.field
        typer.echo(f"kvlite: {flag}: {error.message}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except (KvliteError, OSError) as error:
        typer.echo(f"kvlite: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _flag(name: str, setting: Setting, default: object) -> inspect.Parameter:
    """One option. Values stay text until EngineConfig checks them: one place knows kinds and ranges."""
    shown = f"auto: {setting.auto}" if default is None else str(default)
    text = f"{setting.help} [{setting.range_text}; default {shown}; {env_name(name)}]"
    if setting.kind is bool:
        flag = flag_name(name)
        annotation: Any = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
    else:
        metavar = setting.unit.upper() or ("TEXT" if setting.kind is str else setting.kind.__name__.upper())
        annotation = Annotated[
            str | None, typer.Option(flag_name(name), help=text, metavar=metavar, show_default=False)
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


SERVER = tuple(Scope)
TERMINAL = (Scope.ENGINE, Scope.ONLINE)
OFFLINE = (Scope.ENGINE, Scope.API)


def _with_settings(
    scopes: Sequence[Scope], *, more: Sequence[inspect.Parameter] = (), batch: bool = False
) -> Callable[..., Callable[..., None]]:
    """Gives a command `more`, MODEL, a flag per setting of `scopes`, and --print-config.

    `batch`: defaults as `EngineConfig.from_env` has them. The command gets the finished EngineConfig, and the values of
    `more` by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        model = Annotated[str | None, typer.Argument(help="Model directory; default: the small model that ships.")]
        parameters = [*more, inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=model)]
        for item in fields(EngineConfig):
            setting = setting_of(item)
            if item.name != "model" and setting.scope in scopes:
                own = setting.batch if batch else None
                parameters.append(_flag(item.name, setting, item.default if own is None else own))
        show = Annotated[bool, typer.Option("--print-config", help="Print the settings in force and exit.")]
        parameters.append(
            inspect.Parameter("print_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=show)
        )

        def run(*, print_config: bool, **values: Any) -> None:
            own = {parameter.name: values.pop(parameter.name) for parameter in more}
            with _one_line_errors():
                config = EngineConfig.from_env(batch=batch, **values)
                if print_config:
                    typer.echo(config.describe())
                else:
                    command(config, **own)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {}
        vars(run)["__signature__"] = inspect.Signature(parameters)
        return run

    return decorate


@app.command(name="serve")
@_with_settings(SERVER)
def serve_command(config: EngineConfig) -> None:
    """Serve MODEL over HTTP in OpenAI's wire format."""
    from kvlite.server.__main__ import serve

    raise typer.Exit(serve(config))


fleet_app = typer.Typer(
    name="fleet", no_args_is_help=True, rich_markup_mode=None, help="Several engines behind one server; live migration."
)
app.add_typer(fleet_app)


def _option(name: str, kind: Any, help: str) -> inspect.Parameter:
    """A flag of a field of FleetSettings."""
    default = FleetSettings.__dataclass_fields__[name].default
    annotation = Annotated[kind, typer.Option(flag_name(name), help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_FLEET = (
    _option("engines", int, f"Engines, each a process with the settings below [1 to {ENGINES_MAX}]."),
    _option("transport", str, "How KV moves between them [shm | tcp]."),
    _option("silence_s", float, "An engine that is silent for so long is dead [0.5 to 300 s]."),
    _option("restarts", int, "Restarts of one engine per minute [0 to 1000]."),
)


@fleet_app.command(name="serve")
@_with_settings(SERVER, more=_FLEET)
def fleet_serve_command(config: EngineConfig, engines: int, transport: str, silence_s: float, restarts: int) -> None:
    """Serve MODEL on several engines as one server. --kv-cache-bytes is what each engine gets."""
    settings = FleetSettings(engines, transport, silence_s, restarts)
    from kvlite.server.__main__ import serve_fleet

    raise typer.Exit(serve_fleet(config, settings))


_Url = Annotated[str, typer.Option("--url", help="Where the server is. Its admin key comes from KVLITE_ADMIN_KEY.")]
_How = Annotated[str, typer.Option("--how", help="What moves along: copy (KV), replay (tokens alone) or auto.")]


@fleet_app.command(name="move")
def fleet_move_command(
    request: Annotated[str, typer.Argument(help="Id of its answer (chatcmpl-...), or its number.")],
    engine: Annotated[int, typer.Argument(help="Number of the engine it moves to.")],
    how: _How = "auto",
    url: _Url = DEFAULT_URL,
) -> None:
    """Move a running REQUEST to ENGINE while its client reads on. Status 1 when it did not move."""
    from kvlite.fleet.cli import call, move_lines

    with _one_line_errors():
        answer = call(url, "POST", "/v1/fleet/move", {"request": request, "engine": engine, "how": how})
        typer.echo(move_lines(answer))
        if answer["result"] != "moved":
            raise typer.Exit(EXIT_FAILED)


@fleet_app.command(name="status")
def fleet_status_command(url: _Url = DEFAULT_URL) -> None:
    """Show engines and the requests that they have."""
    from kvlite.fleet.cli import call, status_lines

    with _one_line_errors():
        typer.echo(status_lines(call(url, "GET", "/v1/fleet")))


_DOCUMENT = inspect.Parameter(
    "document",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None, typer.Option("--document", help="Text file that every question is about; repeatable.")
    ],
)


@app.command(name="chat")
@_with_settings(TERMINAL, more=(_DOCUMENT,))
def chat_command(config: EngineConfig, document: list[str] | None) -> None:
    """Talk to MODEL in the terminal, about documents if you like. Ctrl-C stops an answer, /quit ends."""
    from kvlite.chat import chat

    chat(config, document or ())


def _argument(name: str, metavar: str, help: str) -> inspect.Parameter:
    annotation = Annotated[Path, typer.Argument(metavar=metavar, help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


_BATCH = (
    _argument("requests", "IN.jsonl", "Requests, one a line: custom_id, method POST, url, body."),
    _argument("answers", "OUT.jsonl", "Their answers, one a line, in the order in which they end."),
)


@app.command(name="batch")
@_with_settings(OFFLINE, more=_BATCH, batch=True)
def batch_command(config: EngineConfig, requests: Path, answers: Path) -> None:
    """Answer a file of requests in OpenAI's batch format on MODEL, without a server.

    An interrupted run continues when the same command is given again: lines that OUT.jsonl has are kept. Lines added to
    IN.jsonl since are answered too; one whose answer you remove from OUT.jsonl is answered again.

    url is /v1/chat/completions or /v1/completions. A bad body is an answer with the status and error that the server
    would give; a bad line stops the command before anything runs.

    Exit status: 0 every line has its answer, 1 it could not go on (full disk, no model), 2 a bad setting or file,
    130 Ctrl-C.
    """
    from kvlite.batch.run import Files, run_batch

    with _one_line_errors():
        if not run_batch(config, Files(requests, answers), lambda line: typer.echo(line, err=True)):
            raise typer.Exit(EXIT_INTERRUPTED)


@app.command(name="demo")
def demo_command() -> None:
    """Start a server on the small model, ask it about documents, show what reuse of their KV saves."""
    from kvlite.demo import demo

    with _one_line_errors():
        raise typer.Exit(demo())


if __name__ == "__main__":
    main()
