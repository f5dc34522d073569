"""Writes reval_kernels as a kernel repository for Hugging Face's package `kernels`.

    python tools/hf_kernel.py FOLDER

FOLDER/build/torch-cpu and FOLDER/build/torch-cuda then hold the package's Python files, the Triton kernels included,
and a metadata.json. There is no compiled code, so one folder serves every torch and every Python. On a CPU the copy
computes by the portable backend; the package has the C++ kernels too (docs/install.md). To load it:

    kernels.get_local_kernel(Path("FOLDER")).token_values(logits, actions)

The copy and an installed reval_kernels may be used in one process: each has its own ops in torch.library.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

BACKENDS = ("cpu", "cuda")
NOT_BUILT = "a kernel repository for Hugging Face's `kernels` holds no compiled code; the package reval-kernels has it"


def package_files() -> dict[str, bytes]:
    """The Python files of the installed package by their paths, and the note that says why the C++ library is absent.

    The package is found, not imported.
    """
    spec = importlib.util.find_spec("reval_kernels")
    assert spec is not None and spec.origin is not None, "reval_kernels is not installed"
    root = Path(spec.origin).parent
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.py"))}
    return found | {"py.typed": b"", "backends/cpu/not_built.txt": NOT_BUILT.encode()}


def metadata(backend: str, files: dict[str, bytes]) -> dict:
    """The content of metadata.json. `id` is the name under which the package is imported; it differs between contents,
    so two versions can be loaded in one process."""
    digests = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    content = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    return {
        "name": "reval-kernels",
        "id": f"_reval_kernels_{backend}_{content[:8]}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def write(folder: Path) -> None:
    """Write the repository. `folder` must not exist, or be empty."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; name a new folder")
    files = package_files()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for name, content in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (variant / "metadata.json").write_text(json.dumps(metadata(backend, files), indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
    print(f"{sys.argv[1]}/build: " + ", ".join(f"torch-{backend}" for backend in BACKENDS))
