"""Check what a user meets first: the public names, what importing them costs, and that all packages are installed."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import graphopt
from graphopt import errors

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "Budget",
    "BudgetError",
    "CaptureError",
    "GraphOptError",
    "LoweringError",
    "MissingDependencyError",
    "Pass",
    "PassError",
    "Pipeline",
    "PipelineError",
    "PlanError",
    "Plan",
    "UnsupportedOperatorError",
    "VerificationError",
    "__version__",
    "debugging",
    "explain",
    "inspect",
    "optimize",
    "without_weights",
}

# Imported only when a model, a target or a test asks for them.
OPTIONAL = ("diffusers", "onnx", "onnxruntime", "onnxscript", "tensorrt", "timm", "torchvision", "transformers")


def listed_packages() -> list[str]:
    """Return the packages that pyproject.toml lists."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages: list[str] = tomllib.loads(text)["tool"]["setuptools"]["packages"]
    return packages


def test_public_names() -> None:
    assert set(graphopt.__all__) == PUBLIC
    assert len(graphopt.__all__) == len(PUBLIC)
    missing = [name for name in graphopt.__all__ if not hasattr(graphopt, name)]
    assert not missing


def test_every_public_name_is_documented() -> None:
    undocumented = [name for name in PUBLIC - {"__version__"} if not inspect.getdoc(getattr(graphopt, name))]
    assert not undocumented


def test_every_error_is_public() -> None:
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.GraphOptError)]
    assert classes
    assert {cls.__name__ for cls in classes} <= PUBLIC
    assert all(getattr(graphopt, cls.__name__) is cls for cls in classes)


def test_version_is_that_of_the_distribution() -> None:
    assert graphopt.__version__ == importlib.metadata.version("graphopt")


@pytest.mark.parametrize("module", ["graphopt", "graphopt.cli"])
def test_import_loads_no_backend(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {OPTIONAL!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", listed_packages())
def test_every_listed_package_imports(package: str) -> None:
    assert importlib.import_module(package).__name__ == package


@pytest.mark.wheel
@pytest.mark.parametrize("package", listed_packages())
def test_installed_package_is_what_is_tested(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).is_relative_to(sysconfig.get_path("purelib"))
