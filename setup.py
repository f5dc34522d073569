"""Builds the C++ kernels with CMake, beside their sources. All other package settings are in pyproject.toml.

The build needs the installed torch: pip install --no-build-isolation -e . Without torch, CMake or a compiler the
package still installs, without the C++ kernels; `reval_kernels.backends()["cpu"].reason` gives the reason.
REVAL_BUILD_CPU=0 skips the build. REVAL_BUILD_CPU=1 makes a failed build an error.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY, NOTE = "libreval_kernels_cpu.so", "not_built.txt"


class CleanBuild(build):
    """A `build` that starts with an empty folder. Otherwise a wheel would hold what an earlier build left in build/: a
    module that was removed since, or a library although this build made none."""

    def run(self) -> None:
        target = Path(self.build_lib).resolve()
        if target.is_relative_to(ROOT / "build"):  # --build-lib may name any folder, even one with other files
            shutil.rmtree(target, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """A `build_ext` that runs CMake; CMakeLists.txt holds the build rules."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("reval_kernels.backends.cpu._")).parent
        package.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, NOTE):
            (package / name).unlink(missing_ok=True)  # a library of an earlier build may not fit these sources
        reason = self.build_library(package)
        if reason is None:
            return
        if os.environ.get("REVAL_BUILD_CPU") == "1":
            raise RuntimeError(reason)
        self.announce(f"The C++ kernels were not built: {reason}", level=3)
        (package / NOTE).write_text(f"its C++ library was not built when the package was installed: {reason}\n")

    def build_library(self, package: Path) -> str | None:
        """Build the library into `package`. Returns the reason if the build failed or was skipped, else None."""
        if os.environ.get("REVAL_BUILD_CPU") == "0":
            return "REVAL_BUILD_CPU=0 was set"
        try:
            import torch
        except ImportError:
            return "torch was not there to build against (is --no-build-isolation missing?)"
        if shutil.which("cmake") is None:
            return "cmake was not found"
        build = ROOT / "build" / f"cpu-torch{torch.__version__}"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # --fresh: CMake refuses a build folder that another generator made, or that was made at another path.
        configure = [
            "cmake",
            "--fresh",
            *generator,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            f"-DOUTPUT_DIR={package}",
            f"-DTORCH_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        for command in (configure, ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                self.announce(done.stdout, level=3)
                lines = [line for line in done.stdout.splitlines() if "rror" in line] or done.stdout.splitlines()
                return f"{' '.join(command[:2])} failed: {lines[0].strip() if lines else 'no output'}"
        return None

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("reval_kernels.backends.cpu._")).parent
        return [str(package / name) for name in (LIBRARY, NOTE) if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("reval_kernels.backends.cpu._", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
