"""Adapters on the Hub, through `huggingface_hub`: a revision is pinned to a commit before anything is fetched.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HOME` are honoured by the library itself; files land in its usual
cache, so what was fetched once is not fetched again, and is there when offline.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import tqdm

from adapters_registry.errors import SourceGated, SourceNotFound, SourceUnavailable, StoreFull
from adapters_registry.lora import CONFIG, KEPT
from adapters_registry.proposal import HubSource


@dataclass(frozen=True)
class Snapshot:
    """A repository folder at one commit: the names in it, and the sizes (bytes) of the files worth fetching."""

    repo: str
    commit: str
    folder: str  # "" or "path/inside/"
    names: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def origin(self) -> str:
        subfolder = f"#{self.folder.rstrip('/')}" if self.folder else ""
        return f"hub:{self.repo}@{self.commit}{subfolder}"


class Hub:
    """The Hub at `endpoint`; what is None comes from the environment, as everywhere in `huggingface_hub`."""

    def __init__(self, endpoint: str | None = None, token: str | None = None, cache_dir: Path | None = None) -> None:
        self._endpoint = endpoint
        self._token = token
        self._cache = cache_dir

    def resolve(self, source: HubSource) -> Snapshot:
        """Pin the revision. Raises SourceNotFound, SourceGated or SourceUnavailable."""
        folder = f"{source.subfolder.strip('/')}/" if source.subfolder else ""
        if is_offline_mode():
            return self._resolve_offline(source, folder)
        with _explained(source.repo, source.revision):
            info = HfApi(endpoint=self._endpoint, token=self._token).model_info(
                source.repo, revision=source.revision, files_metadata=True
            )
        if info.sha is None:
            raise SourceUnavailable(f"The Hub did not say which commit '{source.repo}' is at; try again.")
        files = {
            each.rfilename.removeprefix(folder): each.size or 0
            for each in info.siblings or ()
            if each.rfilename.startswith(folder)
        }
        if not files:
            raise SourceNotFound(f"Hub repository '{source.repo}' has no folder '{source.subfolder}'.")
        self._remember(source, info.sha)
        return Snapshot(
            repo=source.repo,
            commit=info.sha,
            folder=folder,
            names=tuple(sorted(files)),
            sizes={name: files[name] for name in KEPT if name in files},
        )

    def _remember(self, source: HubSource, commit: str) -> None:
        """Note in the Hub's cache where the revision points, as the library does: offline it is asked for by name."""
        cache = self._cache or Path(HF_HUB_CACHE)
        ref = cache / repo_folder_name(repo_id=source.repo, repo_type="model") / "refs" / (source.revision or "main")
        if ref.name != commit:
            with _explained(source.repo, source.revision):
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)

    def _resolve_offline(self, source: HubSource, folder: str) -> Snapshot:
        """Whatever the cache holds of that revision."""
        with _explained(source.repo, source.revision):
            config = Path(
                hf_hub_download(
                    source.repo,
                    folder + CONFIG,
                    revision=source.revision,
                    cache_dir=self._cache,
                    local_files_only=True,
                )
            )
        names = tuple(sorted(each.name for each in config.parent.iterdir()))
        return Snapshot(
            repo=source.repo,
            commit=config.parents[folder.count("/")].name,  # .../snapshots/<commit>/<folder>/adapter_config.json
            folder=folder,
            names=names,
            sizes={name: (config.parent / name).stat().st_size for name in KEPT if name in names},
        )

    def download(self, snapshot: Snapshot, name: str, tell: Callable[[float], None]) -> Path:
        """The path of one file in the Hub's cache; a download that breaks is resumed where it stopped.

        `tell` is given the fraction received so far.
        """
        with _explained(snapshot.repo, snapshot.commit):
            return Path(
                hf_hub_download(
                    snapshot.repo,
                    snapshot.folder + name,
                    revision=snapshot.commit,
                    cache_dir=self._cache,
                    endpoint=self._endpoint,
                    token=self._token,
                    tqdm_class=_bar(tell),
                )
            )


def _bar(tell: Callable[[float], None]) -> type[tqdm]:
    """A progress bar that draws nothing and tells `tell`; the library takes a class and makes the bars itself.

    It may make two of them, for bytes received and bytes written: the one that is ahead counts.
    """
    furthest = 0.0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.n += n or 0
            fraction = min(1.0, self.n / self.total) if self.total else 0.0
            if fraction > furthest:
                furthest = fraction
                tell(fraction)

    return Bar


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """The library's errors as ours. Order matters: its GatedRepoError is a RepositoryNotFoundError."""
    try:
        yield
    except GatedRepoError as error:
        raise SourceGated(
            f"Hub repository '{repo}' is gated. Accept its conditions on its page, then set HF_TOKEN to your token."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceNotFound(
            f"There is no Hub repository '{repo}', or it is private. Check the name; set HF_TOKEN for a private one."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceNotFound(f"Hub repository '{repo}' has no revision '{revision}'.") from error
    except RemoteEntryNotFoundError as error:
        raise SourceNotFound(f"Hub repository '{repo}' no longer has a file it listed: {error}") from error
    except HFValidationError as error:
        raise SourceNotFound(f"'{repo}' is not the name of a Hub repository; it should look like org/name.") from error
    except (HTTPError, OSError, RuntimeError) as error:  # Xet's downloader raises RuntimeError
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the Hub cache") from error
        if is_offline_mode():
            raise SourceUnavailable(
                f"Hub repository '{repo}' is not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or fetch the "
                "repository first."
            ) from error
        raise SourceUnavailable(f"Fetching '{repo}' from the Hub failed: {error}. Try again later.") from error
