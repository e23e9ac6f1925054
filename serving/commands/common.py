"""What commands share: options, output, and a client of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import httpx

out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="MOERGE_URL", help="The running server.", show_default=True)]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="MOERGE_API_KEY", help="API key, when it wants one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def fail(message: str) -> NoReturn:
    """Print why and leave with exit code 1."""
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def client(url: str, api_key: str | None) -> Iterator[httpx.Client]:
    """An HTTP client whose failures become one clear line."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(600, connect=5)) as http:
            yield http
    except httpx.ConnectError:
        fail(f"No server at {url}. Start one with `moerge serve`, or say where it is with --url or MOERGE_URL.")
    except httpx.HTTPError as error:
        fail(f"{url}: {type(error).__name__}: {error}")


def answer(response: httpx.Response) -> Any:
    """The JSON of a good answer; anything else ends the command with the server's own message."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and body is not None:
        return body
    error = body.get("error") if isinstance(body, dict) else None
    fail(str(error["message"]) if isinstance(error, dict) else f"{response.status_code}: {response.text:.500}")


def follow(http: httpx.Client, path: str, outcome: str, *, quiet: bool, shown: str, **request: Any) -> dict[str, Any]:
    """POST what takes its time and show its progress; gives the data of the event `outcome`.

    `shown` is the command that shows it, too.

    Ends the command when it is refused.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    params = {"stream": "true", **request.pop("params", {})}
    with (
        Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress,
        http.stream("POST", path, params=params, **request) as response,
    ):
        if not response.is_success:
            response.read()
            answer(response)
        task = progress.add_task("send", total=None)
        event = ""
        for line in response.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                event = value
            elif key == "data":
                data: dict[str, Any] = json.loads(value)
                if event == "progress":
                    known = 0 < data["fraction"] < 1
                    progress.update(
                        task, description=data["stage"], total=1 if known else None, completed=data["fraction"]
                    )
                elif event == outcome:
                    return data
                else:
                    progress.stop()
                    fail(data["error"]["message"])
    return fail(f"The server closed the connection before it was done; `{shown}` shows what it has.")
