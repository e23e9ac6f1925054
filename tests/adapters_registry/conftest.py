"""A registry on each kind of database."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from adapters_registry.base import BaseSpec
from adapters_registry.expert import Expert, State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MOERGE_TEST_POSTGRES_URL, or a private server on loopback; skips where there is neither."""
    if url := os.environ.get("MOERGE_TEST_POSTGRES_URL"):
        yield url
        return
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name)
    search = os.pathsep.join([*(str(path) for path in reversed(binaries)), os.environ.get("PATH", "")])
    initdb, pg_ctl = shutil.which("initdb", path=search), shutil.which("pg_ctl", path=search)
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed (no initdb or pg_ctl), and MOERGE_TEST_POSTGRES_URL is not set")
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="moerge-postgres-"))
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(folder / "data")

    def call(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)

    call(initdb, "-D", data, "-U", "moerge", "-A", "trust", "-E", "UTF8", "--no-sync")
    # Durability is not what is tested here, and a test should not wait for a disk.
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    call(pg_ctl, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg://moerge@127.0.0.1:{port}/postgres"
    finally:
        call(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None (SQLite in the data folder), and the URL of an empty PostgreSQL schema."""
    if request.param == "sqlite":
        yield None
        return
    server = make_url(request.getfixturevalue("postgres_url"))
    schema = f"moerge_test_{uuid.uuid4().hex}"  # quicker to make than a database
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        yield server.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(hide_password=False)
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    admin.dispose()


@pytest.fixture
def registry(tmp_path: Path, database_url: str | None, base: BaseSpec) -> Iterator[Registry]:
    with Registry.open(tmp_path / "data", url=database_url, base=base) as opened:
        yield opened


Register = Callable[..., Expert]


@pytest.fixture
def register() -> Register:
    """`register(registry, name, folder, state=State.ACTIVE, **Proposal's arguments)`."""

    def call(registry: Registry, name: str, folder: Path, state: State = State.ACTIVE, **details: Any) -> Expert:
        proposal = Proposal(name=name, source=FolderSource(path=folder), **details)
        with registry.prepare(proposal) as prepared:
            return registry.commit(prepared, state=state)

    return call
