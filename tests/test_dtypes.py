"""Half precision on a CPU: whether it is slow there is measured and said; float32 is never measured."""

from __future__ import annotations

import logging

import pytest
import torch
from families import checkpoint

from spilt.model import host


@pytest.mark.parametrize(("times", "said"), [(9.0, True), (0.3, False)])
def test_slow_arithmetic_is_said(times: float, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host, "slower", lambda dtype: times if dtype is torch.bfloat16 else 1.0)
    with caplog.at_level(logging.WARNING, "spilt"):
        host.load(checkpoint(), "float32", "cpu")
        assert not caplog.records
        host.load(checkpoint(), "bfloat16", "cpu")
    assert [record.getMessage() for record in caplog.records] == (
        ["matrix products in bfloat16 take 9 times as long as in float32 on this CPU; --dtype float32 is faster here"] if said else []
    )


def test_it_is_measured() -> None:
    assert 1 / host.SLOW < host.slower(torch.float32) < host.SLOW
    assert host.slower(torch.bfloat16) > 0
