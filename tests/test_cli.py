"""The command line: light imports, flags from the settings, one clear line and an exit status for every mistake."""

import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvlite
from kvlite.cli import app
from kvlite.config import EngineConfig, flag_name, setting_of

SHIPPED_MODEL = Path(kvlite.__file__).parent / "model"
HEAVY = ("torch", "triton", "fastapi", "uvicorn", "numpy", "tokenizers", "jinja2", "prometheus_client", "kvlite._core")


def invoke(*arguments: str, **environ: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", **environ})


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["--version"], ["serve", "--print-config"]])
def test_help_imports_nothing_heavy(arguments: list[str]):
    code = (
        "import sys; sys.argv = ['kvlite', *sys.argv[1:]]\n"
        "from kvlite.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_setting_is_a_flag_of_serve_with_its_range_and_variable():
    text = " ".join(invoke("serve", "--help").output.split())
    for item in fields(EngineConfig):
        if item.name != "model":
            assert flag_name(item.name) in text
            assert setting_of(item).help in text
            assert f"KVLITE_{item.name.upper()}" in text


def test_chat_has_the_engines_flags_but_not_the_servers():
    text = invoke("chat", "--help").output
    assert "--max-model-len" in text
    assert "--port" not in text


def test_a_document_that_cannot_be_read_is_one_line_before_the_model_loads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvlite.chat.Engine", None)
    done = invoke("chat", "--document", "missing.txt", "--reuse", "blend")
    assert done.exit_code == 2
    assert done.stderr.startswith("kvlite: --document: missing.txt is no document: ")
    assert len(done.stderr.splitlines()) == 1


def test_print_config_shows_flags_over_variables_over_defaults_and_hides_the_key():
    done = invoke(
        "serve", "--print-config", "--max-num-seqs", "7", "--no-enable-prefix-caching", "--kv-cache-bytes", "1MiB",
        KVLITE_MAX_NUM_SEQS="5", KVLITE_SEED="3", KVLITE_API_KEY="sesame",
    )  # fmt: skip
    lines = done.output.splitlines()
    for expected in (
        "max_num_seqs = 7", "seed = 3", "enable_prefix_caching = False", "kv_cache_bytes = 1048576", "block_size = 16",
        "api_key = ***",
    ):  # fmt: skip
        assert expected in lines
    assert "sesame" not in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "70000"], "--port: 70000 is out of range: must be 0 to 65535"),
        (["serve", "--max-num-seqs", "many"], "--max-num-seqs: 'many' is not allowed"),
        (["serve", "--device", "tpu"], "--device: 'tpu' is not allowed: must be auto | cpu | cuda"),
        (["serve", "--max-num-batched-tokens", "4"], "--max-num-batched-tokens: 4 is below max_num_seqs=64"),
        (["serve", "--host", "0.0.0.0"], "--host: '0.0.0.0' is reachable from other machines"),
        (["serve", "--recompute-ratio", "1.5"], "--recompute-ratio: 1.5 is out of range: must be 0 to 1"),
        (["serve", "--reuse", "verify"], "--reuse: 'verify' is not allowed: must be off | prefix | blend"),
        (["serve", "--api-key", "a,a"], "--api-key: two keys are the same"),
        (["serve", "--api-key", "a", "--admin-key", "a"], "--admin-key: two keys are the same"),
        (["serve", "--public-documents", "missing.jsonl"], "--public-documents: missing.jsonl cannot be read"),
        (["serve", "--host", ""], "--host: '' is reachable from other machines"),
        (["serve", "--host", "example.org"], "--host: 'example.org' is reachable from other machines"),
        (["serve", "--kv-cache-bytes", "1"], "--kv-cache-bytes: 1 bytes hold no block"),
        (["serve", "--max-model-len", "4096"], "--max-model-len: 4096 is above the 2048 positions of the model"),
    ],
)
def test_a_bad_setting_is_one_line_and_status_2(arguments: list[str], says: str):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"kvlite: {says}")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_flag_or_command_is_status_2():
    assert invoke("serve", "--colour", "red").exit_code == 2
    assert invoke("paint").exit_code == 2


def test_a_port_in_use_is_said_before_the_model_loads(monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("kvlite.server.__main__.Engine", load)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = invoke("serve", "--port", str(taken.getsockname()[1]))
    assert done.exit_code == 2
    assert "Address already in use" in done.stderr


def copy_of_the_model(target: Path) -> Path:
    shutil.copytree(SHIPPED_MODEL, target / "copy")
    return target / "copy"


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def hostile_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def broken_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")


@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (no_tokenizer, "tokenizer.json"),
        (broken_tokenizer, "tokenizer.json"),
        (no_config, "config.json"),
        (no_weights, "safetensors"),
        (truncated_weights, "model.safetensors"),
        (hostile_header, "model.safetensors"),
        (broken_template, "chat template"),
    ],
)
def test_a_damaged_model_is_one_line_that_names_the_file_and_status_1(command, damage, names, tmp_path):
    model = copy_of_the_model(tmp_path)
    damage(model)
    done = invoke(command, str(model), *(["--port", "0"] if command == "serve" else []))
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvlite: ")
    assert names in lines[0]


def test_a_model_that_is_not_there_is_one_line_and_status_1(tmp_path: Path):
    done = invoke("serve", str(tmp_path / "missing"), "--port", "0")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"kvlite: {tmp_path}/missing: no such directory")
    assert len(done.stderr.splitlines()) == 1
