"""Check the packaging of the checkout: what is listed is there, and what is there is listed."""

import importlib
import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Where the packages outside graphopt/ lie; the same mapping as in pyproject.toml.
OUTSIDE = {"graphopt.passes": ROOT / "passes", "graphopt.targets": ROOT / "targets"}


def pyproject() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, Version]:
    """Return the version that constraints.txt names for each distribution, by normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


def packages_on_disk() -> set[str]:
    """Return the dotted name of every folder of the package that holds a Python file."""
    found = set()
    for package, folder in {"graphopt": ROOT / "graphopt", **OUTSIDE}.items():
        for path in folder.rglob("*.py"):
            parts = path.parent.relative_to(folder).parts
            if package != "graphopt" or not parts or parts[0] not in ("passes", "targets"):
                found.add(".".join((package, *parts)))
    return found


def folder_of(package: str) -> Path:
    """Return the folder of a package in the checkout."""
    top = next((name for name in OUTSIDE if f"{package}.".startswith(f"{name}.")), "graphopt")
    return OUTSIDE.get(top, ROOT / "graphopt").joinpath(*package.removeprefix(top).split(".")[1:])


def test_packages_on_disk_are_listed() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_on_disk()


def test_every_package_has_an_init_that_says_what_lives_there() -> None:
    for package in sorted(packages_on_disk()):
        init = folder_of(package) / "__init__.py"
        assert init.is_file(), f"{package}: {init} is missing"
        assert init.read_text(encoding="utf-8").startswith('"""'), f"{init} has no docstring"


def test_data_files_are_packaged() -> None:
    data = pyproject()["tool"]["setuptools"]["package-data"]
    packaged = {path for package, globs in data.items() for glob in globs for path in folder_of(package).glob(glob)}
    on_disk = {
        path
        for package in packages_on_disk()
        for path in folder_of(package).iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert packaged == on_disk


@pytest.mark.parametrize("name", ["passes", "targets"])
def test_links_lead_out_of_the_package(name: str) -> None:
    link = ROOT / "graphopt" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert pyproject()["tool"]["setuptools"]["package-dir"][f"graphopt.{name}"] == name


@pytest.mark.parametrize("package", sorted(name for name in packages_on_disk() if name.startswith(tuple(OUTSIDE))))
def test_folders_beside_the_core_refuse_any_name_but_the_dotted_one(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = package.removeprefix("graphopt.")
    top = plain.split(".")[0]
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"is the package 'graphopt.{top}', but was imported as '{top}'"):
        importlib.import_module(plain)


def test_every_requirement_is_pinned_within_its_range() -> None:
    project = pyproject()["project"]
    pinned = pins()
    for requirement in map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values())):
        version = pinned.get(requirement.name.lower())
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version} of constraints.txt"


def test_pre_commit_uses_the_pinned_tools() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    found = re.findall(r"additional_dependencies: \[([\w-]+)==([\w.]+)\]", config)
    assert found
    assert {(name, Version(version)) for name, version in found} <= set(pins().items())
