"""`EngineConfig`: every setting, once. CLI flags, KVLITE_ variables, docs rows and CoreConfig are derived from it.

Owns names, defaults, help texts and bounds; knows neither models nor the core. Frozen: values that depend on the model
or the machine stay None ("auto") here and are resolved by the engine. Used by Engine, the CLI, the server and the docs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from kvlite.errors import ConfigError

ENV_PREFIX = "KVLITE_"
TIMEOUT_S_MAX = 1e6
"""Of a request, and what stands for no limit: 11 days."""


class Device(StrEnum):
    """Where the model runs; auto takes a CUDA device when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """Number format of weights and KV; auto is bfloat16 where the machine multiplies it natively, else float32.

    A CPU keeps 16-bit weights in 16 bits under float32 too: it loses nothing and reads half of the bytes.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Policy(StrEnum):
    """Order in which waiting requests are admitted; sched/policy.rs has each one's objective and bound."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    HIT_RATE = "hit-rate"
    CACHE_AWARE = "cache-aware"
    FAIR = "fair"
    PREFIX_GROUPED = "prefix-grouped"


class DefaultReuse(StrEnum):
    """What a request takes from the cache when it does not say; see kvlite.ReuseMode."""

    OFF = "off"
    PREFIX = "prefix"
    BLEND = "blend"


class Scope(StrEnum):
    """Who reads a setting, beside the variables and EngineConfig itself."""

    ENGINE = "engine"
    """Every engine."""
    ONLINE = "online"
    """Engines for whose answers somebody waits."""
    API = "api"
    """Whoever reads bodies in OpenAI's format: the server and batch."""
    SERVER = "server"


@dataclass(frozen=True)
class Setting:
    """What is known of one field beside its name and default: enough to print, parse and check it."""

    kind: type[Any]
    help: str
    low: float | None = None
    high: float | None = None
    optional: bool = False
    """None is allowed and means what `auto` says."""
    auto: str = ""
    unit: str = ""
    core: bool = False
    """Passed on to the core's config under the same name."""
    secret: bool = False
    """Never printed."""
    scope: Scope = Scope.ENGINE
    batch: Any = None
    """Default of engines that answer a file, if it is another: memory should bind there, not this."""

    @property
    def range_text(self) -> str:
        """Allowed values in words, for errors and docs."""
        if issubclass(self.kind, StrEnum):
            return " | ".join(self.kind)
        if self.low is None and self.high is None:
            return {bool: "true | false", str: "text"}.get(self.kind, "any")
        low = "-inf" if self.low is None else f"{self.low:g}" if self.kind is float else str(int(self.low))
        high = "inf" if self.high is None else f"{self.high:g}" if self.kind is float else str(int(self.high))
        return f"{low} to {high}{' ' + self.unit if self.unit else ''}"


def _setting(default: Any, kind: type[Any], help: str, **more: Any) -> Any:
    setting = Setting(kind=kind, help=help, optional=default is None, **more)
    return field(default=default, repr=not setting.secret, metadata={"setting": setting})


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine and its server. Raises ConfigError naming field, value and range."""

    model: str | None = _setting(None, str, "model directory in Hugging Face layout", auto="the small model that ships")
    served_model_name: str | None = _setting(
        None, str, "name of the model in the API", auto="name of its directory", scope=Scope.API
    )
    device: Device = _setting(Device.AUTO, Device, "where the model runs")  # noqa: RUF009
    dtype: DType = _setting(DType.AUTO, DType, "number format of weights and KV cache")  # noqa: RUF009
    max_model_len: int | None = _setting(
        None, int, "longest prompt plus output", low=2, high=1 << 24, unit="tokens", auto="from the model", core=True
    )
    block_size: int = _setting(16, int, "tokens per KV block", low=1, high=256, unit="tokens", core=True)
    kv_cache_bytes: int | None = _setting(
        None, int, "memory for the KV cache (accepts 512MiB, 2GiB)", low=1, high=1 << 46, unit="bytes",
        auto="a quarter of the free memory, at most 2 GiB on a CPU; 60 % of it on a GPU",
    )  # fmt: skip
    host_cache_bytes: int | None = _setting(
        None, int, "main memory for cached KV that the KV cache has no room for; 0 keeps none", low=0, high=1 << 46,
        unit="bytes", auto="none on a CPU; beside a GPU a quarter of the free memory, at most four KV caches",
    )  # fmt: skip
    max_num_seqs: int = _setting(64, int, "sequences that run at once", low=1, high=1 << 16, core=True, batch=256)
    max_num_batched_tokens: int = _setting(
        1024, int, "tokens computed per step", low=1, high=1 << 20, unit="tokens", core=True, batch=2048
    )
    max_num_waiting: int = _setting(1024, int, "requests that may wait", low=1, high=1 << 20, core=True, batch=1 << 17)
    enable_prefix_caching: bool = _setting(True, bool, "keep finished KV for later prompts", core=True)
    prefix_grouping: bool = _setting(True, bool, "read a prefix that running requests share once per step")
    policy: Policy = _setting(  # noqa: RUF009
        Policy.FCFS, Policy, "order of admission: arrival, level of priority, largest cached share first, least work"
        " first, least served tenant first, prompts that begin alike together", core=True,
    )  # fmt: skip
    max_passes: int = _setting(
        64, int, "later requests that hit-rate, cache-aware, fair (its tenant's) and prefix-grouped let pass one",
        low=0, high=1 << 20, core=True,
    )  # fmt: skip
    reuse: DefaultReuse = _setting(DefaultReuse.PREFIX, DefaultReuse, "cached KV that a request takes unless it says")  # noqa: RUF009
    reuse_method: str = _setting("query", str, "how blended requests choose the rows to recompute")
    recompute_ratio: float = _setting(
        0.15, float, "share of a blended request's reused rows that is recomputed", low=0.0, high=1.0
    )
    segment_cache_ratio: float = _setting(
        0.5, float, "share of the KV pool that segments may take", low=0.0, high=1.0, core=True
    )
    canonical_prefix: str | None = _setting(
        None, str, "text, special tokens included, that segments are computed behind", auto="from the model"
    )
    max_documents: int = _setting(64, int, "documents per request", low=1, high=4096)
    max_stored_documents: int = _setting(4096, int, "documents kept by id", low=0, high=1 << 20)
    min_agreement: float | None = _setting(
        None, float, "share of blended first tokens that must be the exact ones; 0 only measures", low=0.0, high=1.0,
        auto="not measured",
    )  # fmt: skip
    agreement_sample_ratio: float = _setting(
        0.02, float, "share of blended requests that is also computed exactly, for min_agreement", low=1e-6, high=1.0
    )
    reserve_tokens: int = _setting(
        64, int, "output set aside per running sequence at admission", low=0, high=1 << 24, unit="tokens", core=True
    )
    watermark_ratio: float = _setting(
        1.0, float, "share of the pool that admission may promise", low=0.01, high=1.0, core=True
    )
    deterministic: bool = _setting(False, bool, "same bits whatever the batching, chunking and cache hits")
    enforce_eager: bool = _setting(False, bool, "decode without CUDA graphs, or tapes of CPU ops: slower small batches")
    seed: int = _setting(0, int, "seed of requests that bring none", low=0, high=(1 << 63) - 1)
    num_threads: int | None = _setting(None, int, "CPU threads", low=1, high=1024, auto="as many as torch takes")
    max_logprobs: int = _setting(20, int, "top log-probabilities per token that a request may ask", low=0, high=1024)
    max_n: int = _setting(8, int, "choices per request", low=1, high=128)
    max_stop: int = _setting(4, int, "stop strings per request", low=0, high=64)
    max_stop_bytes: int = _setting(64, int, "length of one stop string", low=1, high=4096, unit="bytes")
    max_logit_bias: int = _setting(1024, int, "entries in logit_bias", low=0, high=1 << 16)
    max_request_tokens: int = _setting(
        1 << 20, int, "prompts * n * (prompt + max_tokens) of one call", low=1, high=1 << 40, unit="tokens"
    )
    request_timeout_s: float = _setting(
        600.0, float, "time after which a request ends with reason timeout; lists and batch files have no such limit",
        low=0.001, high=TIMEOUT_S_MAX, unit="s", scope=Scope.ONLINE,
    )  # fmt: skip
    host: str = _setting("127.0.0.1", str, "address to listen on", scope=Scope.SERVER)
    port: int = _setting(8000, int, "port to listen on; 0 takes a free one", low=0, high=65535, scope=Scope.SERVER)
    api_key: str | None = _setting(
        None, str, "key that clients must send; several, with commas between, are tenants", auto="none; loopback only",
        secret=True, scope=Scope.SERVER,
    )  # fmt: skip
    admin_key: str | None = _setting(
        None, str, "key that may publish documents for every tenant", auto="none", secret=True, scope=Scope.SERVER
    )
    public_documents: str | None = _setting(
        None,
        str,
        "JSON-lines file of documents (id, title, text) that every tenant may use",
        auto="none",
        scope=Scope.SERVER,
    )
    max_body_bytes: int = _setting(
        1 << 20, int, "size of one request body", low=1024, high=1 << 30, unit="bytes", scope=Scope.API
    )
    strict_fields: bool = _setting(False, bool, "refuse unknown request fields with 400", scope=Scope.API)
    drain_s: float = _setting(
        30.0, float, "time that running requests get after SIGTERM", low=0.0, high=3600.0, unit="s", scope=Scope.SERVER
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = _coerce(item.name, setting_of(item), getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: every running sequence "
                "needs a token per step",
            )

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, batch: bool = False, **overrides: Any
    ) -> EngineConfig:
        """Settings from KVLITE_<FIELD> variables; an override that is not None wins. Unknown names are errors.

        `batch`: what neither says has the default of engines that answer a whole file.
        """
        environ = os.environ if environ is None else environ
        known = {item.name for item in fields(cls)}
        values: dict[str, Any] = {}
        if batch:
            own = {item.name: setting_of(item).batch for item in fields(cls)}
            values = {name: default for name, default in own.items() if default is not None}
        for name in known:
            text = environ.get(env_name(name))
            if text is not None:
                values[name] = text
        for name, value in overrides.items():
            if name not in known:
                raise ConfigError(name, f"unknown setting; known are {', '.join(sorted(known))}")
            if value is not None:
                values[name] = value
        return cls(**values)

    def describe(self) -> str:
        """One line per setting: name = value, with the meaning of auto; secrets are masked."""
        lines: list[str] = []
        for item in fields(self):
            setting, value = setting_of(item), getattr(self, item.name)
            if value is None:
                shown = f"auto ({setting.auto})" if setting.auto else "none"
            else:
                shown = "***" if setting.secret else str(value)
            lines.append(f"{item.name} = {shown}")
        return "\n".join(lines)

    def core_values(self) -> dict[str, Any]:
        """The fields that the core's config shares by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if setting_of(item).core}


def setting_of(item: Field[Any]) -> Setting:
    """The Setting of a field of EngineConfig."""
    setting = item.metadata["setting"]
    assert isinstance(setting, Setting)
    return setting


def env_name(name: str) -> str:
    """KVLITE_MAX_NUM_SEQS for max_num_seqs."""
    return ENV_PREFIX + name.upper()


def flag_name(name: str) -> str:
    """--max-num-seqs for max_num_seqs."""
    return "--" + name.replace("_", "-")


def docs_rows() -> list[tuple[str, str, str, str, str]]:
    """(flag, variable, default, range, help) of every setting, in order."""
    rows: list[tuple[str, str, str, str, str]] = []
    for item in fields(EngineConfig):
        setting = setting_of(item)
        default = f"auto: {setting.auto}" if item.default is None else str(item.default)
        if setting.batch is not None:
            default += f"; batch: {setting.batch}"
        rows.append((flag_name(item.name), env_name(item.name), default, setting.range_text, setting.help))
    return rows


_SIZES = {"": 1} | {f"{unit}{i}": (1024 if i else 1000) ** (n + 1) for n, unit in enumerate("kmgt") for i in ("", "i")}
_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def parse_bytes(text: str) -> int:
    """512, 512MiB, 1.5GB or 2g in bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _SIZES:
        raise ValueError(text)
    return int(float(match[1]) * _SIZES[match[2]])


def _coerce(name: str, setting: Setting, value: Any) -> Any:
    """`value` as the field's kind and inside its range, or ConfigError."""
    if value is None and setting.optional:
        return None
    try:
        if isinstance(value, str) and setting.optional and value.lower() in ("", "auto", "none"):
            return None
        value = _as_kind(setting, value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ConfigError(name, f"{value!r} is not allowed: must be {setting.range_text}") from None
    too_low = setting.low is not None and not value >= setting.low
    if too_low or (setting.high is not None and not value <= setting.high):
        raise ConfigError(name, f"{value!r} is out of range: must be {setting.range_text}")
    return value


def _as_kind(setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        return value if isinstance(value, bool) else _BOOLS[value.lower()]
    if isinstance(value, bool):
        raise TypeError(value)
    if setting.kind is int:
        if isinstance(value, str):
            return parse_bytes(value) if setting.unit == "bytes" else int(value)
        if int(value) != value:
            raise ValueError(value)
        return int(value)
    if setting.kind is str and not isinstance(value, str | Path):
        raise TypeError(value)
    return str(value) if setting.kind is str else setting.kind(value)
