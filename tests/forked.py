"""Commands in processes of their own, without the seconds that Python, torch and transformers take to start.

`multiprocessing`'s fork server imports once what every command imports; a command is a fork of it, with its own words, environment,
folder, files and process group. What is shown of the start itself, of Python's own options or of variables that a library reads while it
is imported needs a process that is really started: `command_line.process`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = "preloaded"  # the module that the server begins with
BEGIN = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def _server() -> Any:
    """The context of the server, which starts with the first command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    now = dict(os.environ)
    try:  # not what a test has set for itself
        os.environ.clear()
        os.environ.update(BEGIN)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(now)
    return context


class Run:
    """One command of `processes` processes (the variables of torch's launcher tell each which it is), as `subprocess.Popen` has it.

    words: what would follow `python`: a script or -c CODE or -m MODULE, and its arguments. The first of several that fails ends the others.
    """

    def __init__(
        self,
        words: Sequence[Any],
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        processes: int = 1,
        said: str = "",
        together: bool = False,
    ) -> None:
        context, given = _server(), {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        folder = Path(self._folder.name)
        self._out, self._err = folder / "out", folder / ("out" if together else "err")
        (folder / "in").write_text(said, encoding="utf-8")
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            given |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        self.returncode: int | None = None
        self._all = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            files = (folder / "in", self._out, self._err)
            run = context.Process(target=_command, args=([str(word) for word in words], {**given, **ranks}, cwd, files), daemon=True)
            run.start()
            self._all.append(run)

    def poll(self) -> int | None:
        codes = [run.exitcode for run in self._all]
        if any(codes):  # as torch's launcher ends the others
            for run in self._all:
                run.terminate()
            first = next(code for code in codes if code)
            for run in self._all:
                run.join(10)
                run.kill()
                run.join()
            self.returncode = first if len(self._all) == 1 else 1
        elif None not in codes:
            self.returncode = 0
        return self.returncode

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each process."""
        return [run.exitcode for run in self._all]

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                for run in self._all:
                    run.join()
                raise subprocess.TimeoutExpired("forked", timeout, "".join(self.said()))
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        for run in self._all:
            try:
                os.killpg(run.pid, signal.SIGKILL)
            except ProcessLookupError:  # not its own group yet, or over
                run.kill()

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return tuple(file.read_text(encoding="utf-8") if file.exists() else "" for file in (self._out, self._err))  # type: ignore[return-value]

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()


def run(words: Sequence[Any], timeout: float = 240, **how: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a command."""
    begun = Run(words, **how)
    out, err = begun.communicate(timeout)
    assert begun.returncode is not None
    return subprocess.CompletedProcess(list(words), begun.returncode, out, err)


def _command(words: list[str], env: dict[str, str], cwd: Path, files: tuple[Path, Path, Path]) -> None:
    """In the fork: what Python does between its start and the first line of the program, and after the last."""
    os.setsid()
    for fd, (path, how) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2), strict=True)):
        os.dup2(os.open(path, how, 0o600), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    code = 1
    try:
        assert IMPORTED in sys.modules, "the fork server could not import what it begins with"
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is a semaphore of all forks: one that is killed while it holds it stops the others
        _program(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(words: list[str]) -> None:
    kind, paths = words[0], os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path]
    if kind == "-m":
        sys.argv[:], sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:], sys.path[:0] = ["-c", *words[2:]], [""]
        exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__ | {"__name__": "__main__"})
    else:
        sys.argv[:], sys.path[:0] = words, [str(Path(kind).resolve().parent)]
        runpy.run_path(kind, run_name="__main__")
