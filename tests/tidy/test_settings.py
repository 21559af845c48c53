"""Every setting of EngineConfig is documented in README.md, as config.py describes it, and read by somebody."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from kvlite.config import EngineConfig, docs_rows, setting_of
from tests.tidy.sources import read, sources

START, END = "<!-- settings: generated from config.py -->", "<!-- end of settings -->"


def table() -> str:
    """The table of settings, as README.md must show it."""
    lines = ["| flag | default | allowed | meaning |", "|---|---|---|---|"]
    for flag, _, *cells in docs_rows():
        name = "MODEL" if flag == "--model" else flag  # the one setting that is an argument, not a flag
        lines.append(" | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    return "\n".join(lines)


def unread(names: list[str], texts: list[str]) -> list[str]:
    """Names that no text reads as an attribute."""
    return [name for name in names if not any(re.search(rf"\.{name}\b", text) for text in texts)]


def test_the_readme_shows_every_setting_as_config_describes_it() -> None:
    text = read(Path("README.md"))
    assert START in text and END in text
    shown = text.split(START)[1].split(END)[0].strip()
    assert shown == table(), "README.md's table is stale; write it with: python -m tests.tidy.test_settings"


def test_every_setting_is_read() -> None:
    python = [read(path) for path in sources(".py", under="python/kvlite/") if path.name != "config.py"]
    own = [item.name for item in fields(EngineConfig) if not setting_of(item).core]
    assert unread(own, python) == []
    rust = [read(path) for path in sources(".rs", under="rust/")]
    core = [item.name for item in fields(EngineConfig) if setting_of(item).core]
    assert unread(core, rust) == []
    assert any("core_values()" in text for text in python)


def test_a_setting_that_nobody_reads_is_caught() -> None:
    assert unread(["seed", "port"], ["x = config.seed_of\ny = config.port\n"]) == ["seed"]


def test_every_setting_has_a_help_text_and_a_default_or_a_meaning_of_auto() -> None:
    for item in fields(EngineConfig):
        setting = setting_of(item)
        assert len(setting.help) > 5, item.name
        assert item.default is not None or setting.auto, f"{item.name}: what does None mean?"


def main() -> None:
    """Writes the table into README.md."""
    path = Path(__file__).resolve().parents[2] / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(START)
    path.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
