"""Settings: bounds, environment, text forms, and what is derived from them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from kvlite import ConfigError, EngineConfig
from kvlite.config import DType, docs_rows, env_name, flag_name, parse_bytes, setting_of


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_num_seqs", 0, "1 to 65536"),
        ("max_num_seqs", True, "1 to 65536"),
        ("max_num_seqs", "many", "1 to 65536"),
        ("block_size", 1.5, "1 to 256"),
        ("drain_s", float("nan"), "0 to 3600"),
        ("watermark_ratio", float("inf"), "0.01 to 1"),
        ("device", "tpu", "auto | cpu | cuda"),
        ("kv_cache_bytes", "2 GiX", "bytes"),
        ("port", 65536, "0 to 65535"),
        ("enable_prefix_caching", "perhaps", "true | false"),
        ("host", 5, "text"),
    ],
)
def test_a_bad_value_names_field_value_and_range(field: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert repr(value) in str(caught.value) and said in str(caught.value)


def test_a_step_must_have_a_token_for_every_running_sequence() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens: 8 .* max_num_seqs=9"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)


def test_environment_variables_are_read_and_arguments_win() -> None:
    environ = {"KVLITE_MAX_NUM_SEQS": "7", "KVLITE_DTYPE": "float16", "KVLITE_KV_CACHE_BYTES": "3MiB", "HOME": "/"}
    config = EngineConfig.from_env(environ, max_num_seqs=9, port=None)
    assert (config.max_num_seqs, config.dtype, config.kv_cache_bytes, config.port) == (9, DType.FLOAT16, 3 << 20, 8000)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_sequences: unknown"):
        EngineConfig.from_env({}, max_num_sequences=4)


def test_engines_that_answer_a_file_have_defaults_of_their_own_which_variables_and_flags_override() -> None:
    plain, batch = EngineConfig.from_env({}), EngineConfig.from_env({}, batch=True)
    assert batch.max_num_seqs > plain.max_num_seqs and batch.max_num_batched_tokens > plain.max_num_batched_tokens
    assert batch.max_num_waiting == 1 << 17
    mixed = EngineConfig.from_env({"KVLITE_MAX_NUM_SEQS": "3"}, batch=True, max_num_waiting=5)
    assert (mixed.max_num_seqs, mixed.max_num_waiting) == (3, 5)
    assert mixed.max_num_batched_tokens == batch.max_num_batched_tokens


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("2GiB", 2 << 30), ("1.5k", 1500), ("3 MB", 3_000_000), ("1ki", 1024)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_every_setting_has_help_and_a_row_and_a_default_that_passes_its_own_check() -> None:
    rows = docs_rows()
    assert [row[0] for row in rows] == [flag_name(item.name) for item in fields(EngineConfig)]
    assert [row[1] for row in rows] == [env_name(item.name) for item in fields(EngineConfig)]
    assert all(len(row[4]) > 5 and row[3] for row in rows)
    assert EngineConfig() == EngineConfig.from_env({})
    assert all(setting_of(item).auto for item in fields(EngineConfig) if item.default is None)


def test_the_key_is_never_shown() -> None:
    config = EngineConfig(api_key="sesame")
    assert "sesame" not in config.describe() and "sesame" not in repr(config)


def test_describe_names_every_setting_and_what_auto_means() -> None:
    text = EngineConfig(max_num_seqs=3).describe()
    assert "max_num_seqs = 3" in text and "max_model_len = auto (from the model)" in text
    assert len(text.splitlines()) == len(fields(EngineConfig))
