"""Time by turns, and the most memory that is held at once."""

import pytest
import torch
from lamina.recipes import measuring
from lamina.recipes.measuring import device, peak_bytes, peak_memory, seconds, seconds_by_turns

MB = 2**18  # floats


def test_calls_take_turns_after_one_round_that_warms_up():
    order = []
    times = seconds_by_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert "".join(order) == "abababab"
    assert [len(of_call) for of_call in times] == [3, 3]
    assert min(map(min, times)) >= 0


def test_a_call_is_made_once_and_takes_time():
    calls = []
    assert seconds(lambda: calls.append(1)) > 0
    assert calls == [1]


def test_one_thread_of_a_cpu_is_timed_by_its_own_work(monkeypatch):
    monkeypatch.setattr(measuring, "process_time", lambda: 1.0)
    monkeypatch.setattr(measuring, "perf_counter", lambda: 2.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert measuring.clock() == (1.0 if device() == "cpu" else 2.0)
        torch.set_num_threads(2)
        assert measuring.clock() == 2.0
    finally:
        torch.set_num_threads(before)


def test_the_peak_is_what_is_held_at_once_beyond_what_was_there():
    before = torch.zeros(8 * MB, device=device())

    def call():
        a = torch.zeros(3 * MB, device=device())
        b = a + 1  # six together
        del a
        return b, torch.zeros(2 * MB, device=device())  # five

    assert peak_bytes(call) == pytest.approx(6 * 2**20, rel=0.01)
    assert before.numel() == 8 * MB


def test_a_block_may_free_what_was_there_before():
    held = [torch.zeros(4 * MB, device=device())]
    with peak_memory() as peak:
        held.append(torch.zeros(MB, device=device()))
        held.pop(0)
        held.append(torch.zeros(2 * MB, device=device()))
    freed = device() == "cuda"  # a CPU's profiler does not see it
    assert peak.bytes == pytest.approx((1 if freed else 3) * 2**20, rel=0.01)
