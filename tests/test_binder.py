"""What binder/ says to repo2docker is complete, and leads a learner to notebooks and dashboards that are there."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from tests.browser.jupyter_lab import LabServer, isolated

ROOT = Path(__file__).parents[1]
BINDER = ROOT / "binder"
LINK = "DASK_DISTRIBUTED__DASHBOARD__LINK"
PREFIX = "/user/ada/"
START_SECONDS = 30
# What repo2docker has an environment for; read in its release 2026.4.0.
PYTHONS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
# Binder's machines. Written here once more: were it the tool's, a mistake there would agree with itself.
MACHINE = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.14",
    "python_version": "3.11",
    "sys_platform": "linux",
}
# What builds of torch for GPUs bring along, and the one that Binder gets does not need.
ONLY_WITH_A_GPU = ("nvidia-", "cuda-", "triton")


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def versions(path: Path) -> dict[str, str]:
    pins = (line.split("==") for line in lines(path) if not line.startswith("-"))
    return {canonicalize_name(name): version for name, version in pins}


# What is installed ----------------------------------------------------------------------------------------------------


def test_the_cpu_build_of_torch_comes_first() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from setup_environment import CPU_INDEX, TORCH
    finally:
        sys.path.pop(0)
    assert lines(BINDER / "requirements.txt")[:2] == [f"--extra-index-url {CPU_INDEX}", f"torch=={TORCH}+cpu"]


def test_nothing_refers_to_other_files() -> None:
    # One such line, and repo2docker copies the repository first and installs everything again after each edit.
    options = [line for line in lines(BINDER / "requirements.txt") if line.startswith((".", "/", "-")) or "@" in line]
    assert len(options) == 1  # the index of torch's builds


def test_versions_are_those_of_the_tests() -> None:
    tested, here = versions(ROOT / "requirements.txt"), versions(BINDER / "requirements.txt")
    here.pop("torch")
    assert here.items() <= tested.items()


def test_it_is_what_make_pins_writes(tmp_path: Path) -> None:
    code = "import binder_requirements as b, pathlib, sys; b.TARGET = pathlib.Path(sys.argv[1]); b.main()"
    written = tmp_path / "requirements.txt"
    subprocess.run([sys.executable, "-c", code, written], cwd=ROOT / "tools", check=True, timeout=60)
    assert written.read_text(encoding="utf-8") == (BINDER / "requirements.txt").read_text(encoding="utf-8")


def asked_by_the_package() -> Iterator[Requirement]:
    for text in requires("parakit") or []:
        requirement = Requirement(text)
        extras = ("", "notebook")
        if requirement.marker is None or any(requirement.marker.evaluate({**MACHINE, "extra": e}) for e in extras):
            yield requirement


def asked_by_packages() -> Iterator[Requirement]:
    for name in versions(BINDER / "requirements.txt"):
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({**MACHINE, "extra": ""}):
                yield requirement


def test_everything_that_is_needed_is_there() -> None:
    here = versions(BINDER / "requirements.txt")
    needed = [*asked_by_the_package(), *asked_by_packages(), Requirement("hatchling")]
    missing = [
        str(requirement)
        for requirement in needed
        if not requirement.name.startswith(ONLY_WITH_A_GPU)
        and (
            (version := here.get(canonicalize_name(requirement.name))) is None
            or not requirement.specifier.contains(version, prereleases=True)
        )
    ]
    assert missing == []


# How it starts --------------------------------------------------------------------------------------------------------


def test_repo2docker_has_this_python() -> None:
    name, version = (BINDER / "runtime.txt").read_text(encoding="utf-8").strip().split("-")
    assert (name, version) == ("python", MACHINE["python_version"])
    assert version in PYTHONS


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_can_be_run(name: str) -> None:
    script = BINDER / name
    assert os.access(script, os.X_OK)
    assert script.read_bytes().startswith(b"#!/bin/bash\n")
    subprocess.run(["bash", "-n", script], check=True, timeout=10)


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_start_leads_the_dashboards_link_through_jupyter(prefix: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name not in (LINK, "JUPYTERHUB_SERVICE_PREFIX")}
    env |= {} if prefix is None else {"JUPYTERHUB_SERVICE_PREFIX": prefix}
    command = [BINDER / "start", "bash", "-c", f'printf "%s|%s" "${LINK}" "$1"', "-", "two words"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=10).stdout
    assert said == f"{prefix or '/'}proxy/{{port}}/status|two words"


def test_start_ends_as_its_command_does() -> None:
    assert subprocess.run([BINDER / "start", "bash", "-c", "exit 3"], check=False, timeout=10).returncode == 3


# Where links lead -----------------------------------------------------------------------------------------------------


def test_badges_open_notebooks_that_are_there() -> None:
    links = re.findall(r"https://mybinder\.org/v2/[^\s)\"'>]+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links, "no Binder badge in README.md"
    for link in links:
        (opened,) = parse_qs(urlsplit(link).query)["urlpath"]
        assert opened.startswith("lab/tree/notebooks/"), link
        assert (ROOT / opened.removeprefix("lab/tree/")).is_file(), link


# Serves until its input ends, as a kernel does until its notebook is closed.
POOL = """
import sys, parakit as pk
with pk.connect(1) as workers:
    print(workers.dashboard, flush=True)
    sys.stdin.read()
"""


@contextmanager
def pool_on_binder(env: dict[str, str]) -> Iterator[str]:
    """A pool of local workers in a process that `start` started; gives the link to its dashboard."""
    command = [BINDER / "start", sys.executable, "-c", POOL]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=START_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def where_it_listens(server: LabServer, state: Path) -> tuple[int, str]:
    """Port and token of a server, from the file that it writes for its own tools."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        for path in (state / "runtime").glob("jpserver-*.json"):
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:  # not yet written to its end
                continue
            return told["port"], told["token"]
        time.sleep(0.1)
    raise AssertionError(f"no server:\n{server.log_end()}")


def answer(port: int, path: str, token: str = "") -> tuple[int, str]:
    """Status and body, without following to a login page, which answers everybody."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("GET", path, headers={"Authorization": f"token {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


async def what_draws_it(port: int, link: str, token: str, page: str) -> str:
    """Kind of the first message on the page's own connection, without which its pictures stay empty."""
    session = re.findall(r'"token":"([^"]+)"', page)[0]
    request = HTTPRequest(f"ws://127.0.0.1:{port}{link}/ws", headers={"Authorization": f"token {token}"})
    connection = await websocket_connect(request, subprotocols=["bokeh", session])
    try:
        return str(json.loads(str(await connection.read_message()))["msgtype"])
    finally:
        connection.close()
        # That only says goodbye: the socket is closed once the other side has answered, which the event loop must see.
        async with asyncio.timeout(START_SECONDS):
            while await connection.read_message() is not None:
                pass


@pytest.mark.dask
def test_the_dashboards_link_answers_through_jupyter(tmp_path: Path, nothing_left: None) -> None:
    # As on the hub: the server lies below a prefix, and nothing but its port can be reached.
    env = {**isolated(tmp_path), "JUPYTERHUB_SERVICE_PREFIX": PREFIX}
    command = [str(BINDER / "start"), sys.executable, "-m", "jupyter_server", "--no-browser", "--ip=127.0.0.1"]
    command += ["--port=0", f"--ServerApp.base_url={PREFIX}", f"--ServerApp.root_dir={tmp_path}"]
    command += ["--allow-root"] if os.getuid() == 0 else []
    server = LabServer(command, cwd=tmp_path, env=env, log=tmp_path / "server.log")
    try:
        with pool_on_binder(env) as link:
            assert re.fullmatch(rf"{PREFIX}proxy/\d+/status", link)
            port, token = where_it_listens(server, tmp_path)
            assert answer(port, link)[0] in (302, 403)
            status, page = answer(port, link, token)
            assert status == 200
            assert 'id="status-fluid"' in page
            assert asyncio.run(what_draws_it(port, link, token, page)) == "ACK"
    finally:
        server.stop()
