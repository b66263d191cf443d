from __future__ import annotations

import os

import pytest

from scion_adapters.errors import InvalidInputError
from scion_trainer.limits import bind_process


def test_cores_that_this_machine_lacks_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="this machine allows"):
        bind_process("4000-4001", None)


def test_threads_reach_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # restored at the end
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "9")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(variable, "")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    bind_process(None, 3)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"  # on shared cores, spinning threads starve each other
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "9"  # what somebody chose is kept
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    bind_process(None, None)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["OMP_NUM_THREADS"] == "3"  # unset leaves things as they are
