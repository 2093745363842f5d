"""Kernels are compiled by one process, and loaded by the others."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, current_thread

import pytest

from basic.bpe import loading
from basic.common.errors import DependencyError
from basic.common.native.kernel import kernel


def test_of_two_that_start_together_one_compiles_and_the_other_waits(tmp_path, monkeypatch, capsys):
    """Two threads stand in for processes: a lock of an open file excludes them too."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    flock, second_has_come, order = fcntl.flock, Event(), []

    def record_flock(file, operation):
        if order:
            second_has_come.set()
        flock(file, operation)

    def compile_kernels():
        order.append(current_thread().name)
        assert second_has_come.wait(60)
        order.append(current_thread().name)

    monkeypatch.setattr(fcntl, "flock", record_flock)
    monkeypatch.setattr(loading, "_call_training_kernels", compile_kernels)
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(loading.compile_kernels, "training", tmp_path)
        while not order:
            assert not first.done(), first.result()
        second = executor.submit(loading.compile_kernels, "training", tmp_path)
        first.result()
        second.result()
    assert len(order) == 2
    assert order[0] == order[1]
    assert capsys.readouterr().err.count("compiling the kernels for training") == 1


def test_a_file_system_without_locks_does_not_hinder(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

    def not_supported(file, operation):
        raise OSError(95, "Operation not supported")

    compiled = []
    monkeypatch.setattr(fcntl, "flock", not_supported)
    monkeypatch.setattr(loading, "_call_training_kernels", lambda: compiled.append(1))
    loading.compile_kernels("training", tmp_path)
    loading.compile_kernels("training", None)
    assert compiled == [1, 1]


def test_a_numba_that_must_not_compile_is_one_clear_error(monkeypatch):
    import numba

    from basic.common.native.compiler import compile_kernel

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(DependencyError, match=r"NUMBA_DISABLE_JIT is set.*unset it"):
        compile_kernel(kernel(lambda number: number), ("i",))
