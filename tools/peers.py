"""The sources of other trainers, for the contract tests of docs/hooks.md: python tools/peers.py FOLDER

Nothing is imported or run. Each trainer gets a folder, in the version that docs/hooks.md names. What cannot be fetched
is reported in a line, and the tests of that trainer skip.
"""

import shutil
import subprocess
import sys
from pathlib import Path

WHEELS = {"openrlhf": "openrlhf==0.11.2", "skyrl": "skyrl==0.3.0", "torchtitan": "torchtitan==0.3.0"}
COMMITS = {
    "prime-rl": ("https://github.com/PrimeIntellect-ai/prime-rl", "559b44772e471d1538537b8805cc77f3824a5e64"),
    "slime": ("https://github.com/THUDM/slime", "624b824a898ab0ec1fcb4d373004c7f3852bf515"),
    "nemo-rl": ("https://github.com/NVIDIA-NeMo/RL", "7ea279abfbeb698b092856d0dab61e7cf39bc909"),
}


def commands(name: str, target: Path) -> list[list[str]]:
    """What puts the sources of a trainer into `target`."""
    if name in WHEELS:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        return [[*pip, "--target", str(target), WHEELS[name]]]
    url, commit = COMMITS[name]
    git = ["git", "-C", str(target)]
    return [
        ["git", "init", "--quiet", str(target)],
        [*git, "fetch", "--quiet", "--depth", "1", url, commit],
        [*git, "checkout", "--quiet", commit],
    ]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*WHEELS, *COMMITS):
        target = folder / name
        if target.exists():
            continue
        for command in commands(name, target):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                error = (done.stderr.strip() or f"status {done.returncode}") if done.returncode else ""
            except (OSError, subprocess.TimeoutExpired) as failure:
                error = str(failure)
            if error:
                shutil.rmtree(target, ignore_errors=True)
                print(f"test-peers: the source of {name} could not be fetched: {error.splitlines()[-1]}")
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
