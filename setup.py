"""Builds the C++ kernels beside their sources, with reval_kernels/backends/cpu/build.py. All other package settings are
in pyproject.toml.

The build needs the installed torch: pip install --no-build-isolation -e . Without torch, CMake or a compiler the
package still installs, without the C++ kernels; `reval_kernels.backends()["cpu"].reason` gives the reason.
REVAL_BUILD_CPU=0 skips the build: the wheel then fits every machine. REVAL_BUILD_CPU=1 makes a failed build an error.
"""

import importlib.util
import os
import re
import shutil
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# by its path, because an import would run the whole package
_spec = importlib.util.spec_from_file_location("cpu_build", ROOT / "reval_kernels/backends/cpu/build.py")
cpu_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cpu_build)


def why_no_library() -> str | None:
    """Why this installation builds no library, as far as that is known before the build."""
    return (
        "the package was made for every machine (REVAL_BUILD_CPU=0)"
        if os.environ.get("REVAL_BUILD_CPU") == "0"
        else cpu_build.missing_tools()
    )


def long_description() -> str:
    """README.md for a package index, where a relative link leads nowhere: absolute links, or only their text as long as
    pyproject.toml has no Repository in [project.urls]."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    repository = urls.get("Repository", "").rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/main/{path})" if repository else text

    return re.sub(r"(!?)\[([^]]*)\]\((?!\w+:|#)([^)]*)\)", absolute, (ROOT / "README.md").read_text())


class CleanBuild(build):
    """A `build` that starts with an empty folder. Otherwise a wheel would hold what an earlier build left in build/: a
    module that was removed since, or a library although this build made none.

    A wheel also holds configs/, as reval/configs: `reval train configs/tiny.yaml` works outside the repository too."""

    def run(self) -> None:
        target = Path(self.build_lib).resolve()
        if target.is_relative_to(ROOT / "build"):  # --build-lib may name any folder, even one with other files
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if (ROOT / "configs").is_dir():
            shutil.copytree(ROOT / "configs", target / "reval" / "configs", dirs_exist_ok=True)


class CMakeBuild(build_ext):
    """A `build_ext` that runs CMake; CMakeLists.txt beside the sources holds the build rules."""

    def run(self) -> None:
        package = self.cpu_folder()
        package.mkdir(parents=True, exist_ok=True)
        (package / cpu_build.NOTE).unlink(missing_ok=True)
        # The library of an earlier build may not fit these sources. Libraries for other versions of torch, which other
        # environments use with this checkout, stay.
        if os.environ.get("REVAL_BUILD_CPU") != "0" and importlib.util.find_spec("torch"):
            import torch

            (package / cpu_build.library_name(torch.__version__)).unlink(missing_ok=True)
        reason = why_no_library() or cpu_build.build_library(package, ROOT / "build")
        if reason is None:
            return
        if os.environ.get("REVAL_BUILD_CPU") == "1":
            raise RuntimeError(reason)
        self.announce(f"The C++ kernels were not built: {reason}", level=3)
        (package / cpu_build.NOTE).write_text(f"its C++ library was not built: {reason}\n")

    def cpu_folder(self) -> Path:
        return Path(self.get_ext_fullpath("reval_kernels.backends.cpu._")).parent

    def get_outputs(self) -> list[str]:
        return [
            str(path) for path in [*self.cpu_folder().glob("*.so"), self.cpu_folder() / cpu_build.NOTE] if path.exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel for every Python, because the library uses nothing of Python; and for every machine if it has none."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if why_no_library() is None else "any")


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("reval_kernels.backends.cpu._", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
