"""The command line in this process, on a model that was made in memory: no start-up, no checkpoint on disk."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import world
from spilt import cli, report
from spilt.model import host

NAME = "model"


class Spelled:
    """A tokenizer whose texts are the token ids as numbers: random models use tokens that have no text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        # the template's end of turn is looked at as text
        return self.inner.decode(ids, **kwargs) if max(ids, default=0) < len(self.inner) else " ".join(map(str, ids))


class Session:
    """A base_dir and a model; `run` is one command line. Use with `with`. pictures: loss mode draws its report, as it does in use."""

    pictures = False

    def __init__(self, shape: world.Shape, *, train: int, test: int, dtype: str = "float32", device: str = "cpu", **rows: Any) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.folder = Path(tempfile.mkdtemp(prefix="spilt-bench-"))
        self.base = self.folder / "base"
        world.write(self.base, NAME, shape, train=train, test=test, weights=False, **rows)
        self.model = world.model(shape, dtype, device)
        self.tokenizer = Spelled(world.tokenizer(shape.config["vocab_size"]))

    def __enter__(self) -> Session:
        self.before = host.load, report.update
        host.load = lambda path, *_, **__: host.Host(self.model, self.tokenizer, path)
        if not self.pictures:
            report.update = lambda base_dir, *_, **__: base_dir
        return self

    def __exit__(self, *_: object) -> None:
        host.load, report.update = self.before
        del self.model
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, method: str = "spilt", form: str = "local_weight") -> float:
        """Wall seconds of one command line (`self.cpu`: the processor's). Raises RuntimeError when its exit code is not 0."""
        cell = ["--dataset", "psychopathy", "--method", method, "--model_name", NAME, "--intervention_method", form]
        common = ["--device", self.device, "--base_dir", str(self.base), "--dtype", self.dtype, "--force", "--quiet"]
        printed = io.StringIO()
        self._synchronize()
        start, busy = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(printed):
            code = cli.main([*cell, *common, *words])
        self._synchronize()
        seconds, self.cpu = time.perf_counter() - start, time.process_time() - busy
        if code != 0:
            raise RuntimeError(f"exit code {code}: {' '.join(words)}\n{printed.getvalue()[-2000:]}")
        return seconds

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
