"""Configuration: one YAML file, then `MOERGE_*` variables, then command-line options; strict, validated at start-up.

`MOERGE_ENGINE__SLOTS=4` sets `engine: {slots: 4}`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from router.encoder import Backend
from router.methods import SERVED
from router.methods.gated import NAMES
from router.router import RouterSettings


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelSettings(Section):
    """The one model that every expert adapts."""

    path: str = Field(description="Folder or Hub id of the base model.")
    name: str | None = Field(None, description="What the API calls it; the path when not given.")
    revision: str | None = Field(None, description="Hub revision.")
    aliases: tuple[str, ...] = Field((), description="Other ids under which adapters may declare this base.")

    @property
    def served_name(self) -> str:
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


class ServerSettings(Section):
    """The HTTP service."""

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    max_body_mb: float = Field(16, gt=0, description="Largest request body; uploads of adapters have their own limit.")
    max_upload_mb: float = Field(2048, gt=0, description="Largest uploaded adapter.")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host names that requests may carry, beside loopback ones; empty: any, once there are keys.",
    )

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class EngineSettings(Section):
    """The embedded vLLM."""

    slots: int = Field(8, ge=1, description="Experts in one batch (vLLM's max_loras).")
    resident: int = Field(64, ge=1, description="Experts kept loaded; least recently used ones go (max_cpu_loras).")
    max_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(
        64, description="Largest rank served: of an adapter, a composite or a blend."
    )
    built_mb: float = Field(
        4096, gt=0, description="Disk for composites and blends built of experts; the least recently used ones go."
    )
    max_model_len: int | None = Field(None, ge=1, description="Context length; the model's own when not given.")
    dtype: str = Field("auto", description="Weights' type: auto, float32, bfloat16, float16.")
    enforce_eager: bool = Field(True, description="No CUDA graphs or compilation: quick starts, slower on a GPU.")
    target_modules: tuple[str, ...] = Field(
        (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "qkv_proj",
            "gate_up_proj",
        ),
        description="Linear modules that adapters may change.",
    )
    vllm: dict[str, Any] = Field(default_factory=dict, description="Any other `vllm serve` option, by its name.")

    @field_validator("resident")
    @classmethod
    def _at_least_slots(cls, value: int, info: Any) -> int:
        return max(value, int(info.data.get("slots", 1)))


class RouterSection(RouterSettings):
    """How prompts find experts: the router's own settings and the encoder they are for.

    What `methods` names is added to the methods that are served anyway; `name: null` takes one out.
    """

    @model_validator(mode="before")
    @classmethod
    def _methods_beside_the_usual(cls, given: Any) -> Any:
        methods = given.get("methods") if isinstance(given, dict) else None
        if not isinstance(methods, dict):
            return given
        usual: dict[str, Any] = {name: {} for name in SERVED}
        return {**given, "methods": {key: value for key, value in (usual | methods).items() if value is not None}}

    stickiness: float = Field(
        2.0,
        ge=0,
        description="Log-odds by which another expert must be better to take over a conversation; 0: each turn anew.",
    )
    near_tie: float = Field(
        0.1, ge=0, description="Log-odds within which an expert that is loaded already goes first; 0: never."
    )
    encoder: str | None = Field(None, description="sentence-transformers model; the packaged MiniLM when not given.")
    encoder_threads: int = Field(1, ge=1, description="Threads that encode prompts.")
    encoder_backend: Backend = Field(
        "auto", description="auto, torch, onnx, onnx-int8: what runs it; auto is onnx-int8 where that can, else torch."
    )


class GroupSettings(Section):
    """Groups of experts that are alike, whose composites are loaded beforehand."""

    by: Literal["weights", "prototypes"] | None = Field(
        None,
        description="Group experts that are alike by their weights, or by their samples; no groups when not given.",
    )
    gates: tuple[str, ...] = Field(("constant",), description="Gates for which every group's composite is loaded.")
    least: float = Field(
        -1, ge=-1, le=1, description="Least mean cosine at which groups are joined; -1: whatever fits."
    )

    @field_validator("gates")
    @classmethod
    def _known_gates(cls, gates: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(gates) - set(NAMES):
            raise ValueError(f"no gate {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
        return gates


class FeedbackSettings(Section):
    """What is kept of the router's decisions, so that users can judge them and `moerge router train` can learn."""

    keep: int = Field(
        20_000, ge=0, description="Decisions kept without a judgement, and as many with one; 0: none, and no feedback."
    )
    days: float = Field(30, gt=0, description="Days that a decision is kept.")
    keep_text: bool = Field(False, description="Keep the routing text of prompts too, not only their embeddings.")


class RegistrySettings(Section):
    """Where experts are kept and what is accepted."""

    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("moerge"),
        description="Folder of adapters and database.",
    )
    database_url: SecretStr | None = Field(None, description="PostgreSQL URL; SQLite in data_dir when not given.")
    import_dirs: tuple[Path, ...] = Field((), description="Folders from which clients may register by path.")
    max_adapter_mb: float = Field(2048, gt=0, description="Largest adapter, wherever it comes from.")
    min_effect: float = Field(
        1e-3, ge=0, description="Least change of a next-token log-probability on its own samples (nats)."
    )
    max_takeover: float = Field(
        0.25, ge=0, le=1, description="Share of two unlike experts' samples that a new one may take; 1: any."
    )


CheckName = Literal["own_task", "confusion", "regression", "duplicates", "loudness", "triggers", "declared"]


class CheckSettings(Section):
    """What `moerge expert check` measures of a version, and what a staged one must show before it is promoted."""

    enforce: Literal["never", "warn", "always"] = Field(
        "warn",
        description="When a staged version is promoted: ask nothing; say what speaks against it; or refuse it.",
    )
    require: tuple[CheckName, ...] = Field(
        ("own_task", "regression", "duplicates", "loudness", "triggers"),
        description="The checks that a version has to pass; the others only inform.",
    )
    samples: int = Field(20, ge=1, description="Samples of each expert that are asked.")
    min_gain: float = Field(
        0.0, ge=-1, le=1, description="Least gain on its own samples over whoever answers them now (exact match)."
    )
    max_confusion: float = Field(
        0.25, ge=0, le=1, description="Share of one other expert's samples that it may take over."
    )
    max_regression: float = Field(
        0.05, ge=0, le=1, description="By how much another expert's samples may be answered worse (exact match)."
    )
    max_cosine: float = Field(
        0.9, ge=0, le=1, description="Largest cosine of its dW with another expert's; nearer ones are copies."
    )
    max_loudness: float = Field(4.0, gt=0, description="Largest robust z-score of its norms among its peers'.")
    max_shift: float = Field(
        5.0, gt=0, description="Largest robust z-score of its effect on neutral prompts among its peers'."
    )


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="MOERGE_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
    )

    manifest: Path | None = Field(None, description="Base model and experts to serve, in one file.")
    base_model: BaseModelSettings | None = None
    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    router: RouterSection = RouterSection()
    groups: GroupSettings = GroupSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    registry: RegistrySettings = RegistrySettings()
    checks: CheckSettings = CheckSettings()
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of Moerge's own log lines.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


class ConfigError(Exception):
    """The configuration cannot be used; the message names every field that is wrong."""


def load_settings(file: Path | None = None, options: Mapping[str, Any] | None = None) -> Settings:
    """Options over the environment over the file; options that are None count as not given.

    Raises ConfigError, one line for each thing that is wrong.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"{file}: no such file.")

    class Sourced(Settings):
        model_config = SettingsConfigDict(yaml_file=file)

    try:
        return Sourced(**_given(options or {}))
    except ValidationError as error:
        where = str(file) if file else "configuration"
        lines = [f"{where}: {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, SettingsError) as error:
        raise ConfigError(f"{file or 'configuration'}: {error}") from error


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: _given(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}
