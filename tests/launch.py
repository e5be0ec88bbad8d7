"""Processes of one run, started as a queue starts them: by environment variables, without a launcher above them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = "import datetime, vnaw_pipeline.processes as p; p._SILENCE = datetime.timedelta(seconds=4); "
"""Code for `start`: takes the others for lost after seconds, for tests that cut the link between them."""
SLOW_WRITES = """
import time, vnaw_pipeline.features.extract as e
keep = e._keep
e._keep = lambda *arguments: (keep(*arguments), time.sleep(0.4))
"""
"""Code for `start`: extraction takes long enough to be killed in the middle."""


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def start(
    process_index: int,
    num_processes: int,
    arguments: Sequence[str],
    *,
    port: int,
    host: str = "127.0.0.1",
    before: str = "",
    inside: Sequence[str] = (),
    code: Path = ROOT,
    **environment: str,
) -> subprocess.Popen[str]:
    """One process of `num_processes` on as many nodes. `before` is code that it runs first, `inside` a command in
    front, `code` the folder that holds the package."""
    variables = {"RANK": process_index, "WORLD_SIZE": num_processes, "MASTER_ADDR": host, "MASTER_PORT": port}
    variables |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1, **environment}
    program = f"{before}\nfrom vnaw_pipeline.cli import main\nmain()"
    return subprocess.Popen(
        [*inside, sys.executable, "-c", program, *arguments],
        cwd=code,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_until(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    """Return when the condition holds; an error if the processes end before."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ends(processes: Sequence[subprocess.Popen[str]], timeout: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each; none is left behind."""
    try:
        found = []
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            found.append((process.returncode, output, errors))
        return found
    finally:
        for process in processes:
            process.kill()
