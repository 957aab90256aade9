"""The number type that `--dtype auto` takes: by what the processor has, and in a run that goes on the one it has."""

import pytest
import torch

from distributed import DeviceError, World
from harness.device import cpu_has_bf16, pick_dtype, room

CPU = World(0, 1, torch.device("cpu"))
X86 = "processor\t: {}\nmodel name\t: bf16 in a name is none\nflags\t\t: fpu avx2 avx512f {}\nbugs\t\t: spectre_v1\n\n"
ARM = "processor\t: {}\nFeatures\t: fp asimd asimddp sve {}\nCPU part\t: 0xd40\n\n"


@pytest.mark.parametrize(
    ("machine", "feature", "has"),
    [
        (X86, "avx512_bf16 clzero", True),  # Zen 4, Cooper Lake
        (X86, "avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8", True),  # Sapphire Rapids
        (X86, "amx_bf16", True),
        (X86, "avx512bw avx512_vnni", False),  # Cascade Lake
        (X86, "amx_tile amx_int8 avx512_bf16x", False),
        (ARM, "i8mm bf16 dgh", True),  # Neoverse V1
        (ARM, "dit uscat", False),  # Neoverse N1
        ("bf16: a file of another kind\n", "", False),
    ],
)
def test_the_processors_features_decide(tmp_path, machine, feature, has):
    (tmp_path / "cpuinfo").write_text("".join(machine.format(n, feature) for n in range(2)))
    assert cpu_has_bf16(tmp_path / "cpuinfo") is has
    assert cpu_has_bf16(tmp_path / "none") is False  # macOS, Windows


def test_auto_is_the_same_each_time_and_that_of_this_processor():
    found = {pick_dtype("auto", CPU) for _ in range(20)}
    assert found == {torch.bfloat16 if cpu_has_bf16() else torch.float32}


@pytest.mark.parametrize("name", ["torch.float32", "float32", "torch.bfloat16", "bfloat16"])
def test_auto_in_a_run_that_goes_on_is_its_type_and_a_type_that_is_given_stays(name):
    """A checkpoint writes torch.float32, a file of generate.py float32."""
    assert str(pick_dtype("auto", CPU, name)) == f"torch.{name.removeprefix('torch.')}"
    assert pick_dtype("bf16", CPU, name) == torch.bfloat16
    assert pick_dtype("fp32", CPU, name) == torch.float32


def test_fp16_needs_a_gpu_also_where_a_run_on_one_goes_on():
    for name, begun_in in (("fp16", None), ("auto", "torch.float16")):
        with pytest.raises(DeviceError, match="^--dtype fp16 needs a GPU: on a CPU use bf16 or fp32$"):
            pick_dtype(name, CPU, begun_in)
    assert pick_dtype("auto", CPU, "int8") == pick_dtype("auto", CPU)  # no type that a run has


def test_ranks_of_a_machine_share_its_memory_and_an_empty_number_of_them_is_one(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = room(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert room(CPU) == whole > 1e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room(CPU) == whole / 4
