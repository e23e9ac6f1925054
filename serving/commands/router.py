"""`moerge router`: what the router learns beside the registry."""

from __future__ import annotations

import typer

from serving.commands.router_calibrate import calibrate
from serving.commands.router_versions import list_versions, promote, rollback, show, train

app = typer.Typer(help="What the router has learned beside the registry.", no_args_is_help=True)
app.command("train")(train)
app.command("calibrate")(calibrate)
app.command("list")(list_versions)
app.command("show")(show)
app.command("promote")(promote)
app.command("rollback")(rollback)
