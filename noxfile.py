"""What is checked beside `make test`: other versions of Python and of the dependencies, the package, its licences.

nox -s tests-3.13       # the fast tests on one Python; nox -s tests runs those that are installed
nox -s lowest           # with the lowest versions that pyproject.toml admits
nox -s highest          # with the highest that can be installed together
nox -s package          # builds and checks wheel and sdist, and runs the wheel outside the repository
nox -s licences         # writes docs/dependencies.md, and the SBOM in build/sbom.cdx.json
"""

from __future__ import annotations

import shutil

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lowest", "highest", "package"]


def tested(session: nox.Session, resolution: str) -> None:
    """Install the package with its tests' dependencies as a resolution chooses them, and run the fast tests."""
    wanted = f"{session.create_tmp()}/requirements.txt"
    session.run(
        *("uv", "pip", "compile", "--quiet", "pyproject.toml", "--extra", "test", "--resolution", resolution),
        *("--python", session.virtualenv.location, "--output-file", wanted),
        external=True,
    )
    session.run("uv", "pip", "sync", "--quiet", wanted, external=True)
    session.run("uv", "pip", "install", "--quiet", "--no-deps", "--editable", ".", external=True)
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The fast tests on one version of Python."""
    tested(session, "highest")


@nox.session(python=PYTHONS[1])
def lowest(session: nox.Session) -> None:
    """The fast tests with the lowest versions of everything that pyproject.toml names."""
    tested(session, "lowest-direct")


@nox.session(python=PYTHONS[-2])
def highest(session: nox.Session) -> None:
    """The fast tests with the highest versions that can be installed together, on the last Python but one."""
    tested(session, "highest")


@nox.session(python=PYTHONS[1])
def package(session: nox.Session) -> None:
    """Wheel and sdist: their metadata, their contents, and the wheel in an environment outside the repository."""
    session.install("--quiet", "--editable", ".[test,package]")
    shutil.rmtree("build/dist", ignore_errors=True)  # so that no file of an earlier version is checked in its place
    session.run("python", "-m", "build", "--quiet", "--outdir", "build/dist")
    session.run("twine", "check", "--strict", "build/dist/*")
    session.run("python", "-m", "pytest", "-n0", "-m", "", "tests/test_distribution.py")


@nox.session(python=PYTHONS[1])
def licences(session: nox.Session) -> None:
    """The table of dependencies and their licences, and a bill of materials of what users install."""
    extras = ".[demo,tune,lora,search,corruptions,openvino]"
    session.install("--quiet", "--editable", extras, "pip-licenses")
    session.run("python", "scripts/dependencies.py", "--write")
    users = f"{session.create_tmp()}/users"  # without the tools that describe it
    session.run("uv", "venv", "--quiet", "--clear", "--python", session.python, users, external=True)
    session.run("uv", "pip", "install", "--quiet", "--python", users, extras, external=True)
    session.install("--quiet", "cyclonedx-bom")
    described = ("--pyproject", "pyproject.toml", "--output-file", "build/sbom.cdx.json")
    session.run("cyclonedx-py", "environment", *described, f"{users}/bin/python")
