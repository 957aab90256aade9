"""The number type that `--dtype auto` takes on a CPU: bf16 where a product of it is clearly faster, else fp32."""

import itertools

import pytest
import torch

import distributed
from distributed import DeviceError, World, pick_dtype

CPU = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [(3.0, 1.0, torch.bfloat16), (3.0, 2.1, torch.float32), (1.0, 4.0, torch.float32), (1.6, 1.0, torch.bfloat16)],
)
def test_auto_is_bf16_where_the_probe_finds_it_one_and_a_half_times_as_fast(monkeypatch, fp32, bf16, expected):
    # The clock: five products of each type, looked at before and after; the first of each is to warm up.
    takes = [99.0, *[fp32] * 4, 99.0, *[bf16] * 4]
    clock = iter(itertools.accumulate(itertools.chain.from_iterable((0.0, seconds) for seconds in takes)))
    monkeypatch.setattr(distributed.time, "perf_counter", lambda: next(clock))
    assert pick_dtype("auto", CPU) == expected
    assert next(clock, None) is None, "every product was looked at"


def test_a_given_type_is_taken_without_a_probe(monkeypatch):
    monkeypatch.setattr(distributed.time, "perf_counter", lambda: pytest.fail("asked the clock"))
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("fp32", CPU) == torch.float32
    with pytest.raises(DeviceError, match="^--dtype fp16 needs a GPU: on a CPU use bf16 or fp32$"):
        pick_dtype("fp16", CPU)
