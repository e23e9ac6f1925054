"""What commands share: options, output, and a client of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

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
