"""How many threads a command starts, and how they wait, by what the machine does."""

from __future__ import annotations

import pytest

from basic.__main__ import choose_threads, machine_state


@pytest.mark.parametrize(
    ("state", "expected", "said"),
    [
        ((2, 2.0, 0.1), {"GOMP_SPINCOUNT": "10000"}, None),
        ((2, 2.0, 1.4), {"OMP_WAIT_POLICY": "PASSIVE"}, "a load of 1.4 on 2 cores: 2 threads, which wait with"),
        ((64, 1.5, 0.0), {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}, "1.5 may be used: 1 thread"),
    ],
)  # fmt: skip
def test_threads_follow_the_machine(state: tuple[int, float, float], expected: dict[str, str], said: str | None):
    environment: dict[str, str] = {}
    line = choose_threads(environment, *state)
    assert environment == expected
    assert line is None if said is None else said in (line or "")
    own = {"OMP_NUM_THREADS": "3"}
    assert choose_threads(own, *state) is None
    assert own == {"OMP_NUM_THREADS": "3"}


def test_the_state_of_this_machine():
    cores, quota, load = machine_state()
    assert cores >= 1
    assert 0 < quota <= cores
    assert load >= 0
