"""What GPUs ask for beyond a CPU, tried without one: whose GPU it is, number types, the allocator, room, memory that is
too little.
"""

import os
import re
import sys
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import TRAINERS
from processes import run_program
from ranks import on_ranks
from runs import one_line, run_script, snapshot
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore
from worlds import QUICK, words_of

import distributed
from distributed import DeviceError, World, device_of_rank
from harness import checkpoints, device, memory_report, optimizers, score_cache

GPU = World(0, 1, torch.device("cuda:0"))
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name=answer of torch.cuda.name, ...): one GPU that says so."""

    def says(**answers):
        answers = {"is_available": True, "device_count": 1, "set_device": None} | answers
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)

    yield says
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_attention_of_cudnn_is_off(gpu):
    gpu()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert distributed.start("cuda").device == torch.device("cuda:0")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# -- whose GPU it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "local_rank", "expected"), [(4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_a_rank_takes_its_own_gpu_and_the_only_one_where_its_launcher_shows_one(gpu, visible, local_rank, expected):
    gpu(device_count=visible)
    assert device_of_rank("cuda", local_rank, local_rank) == torch.device("cuda", expected)


def test_a_rank_without_a_gpu(gpu):
    gpu(device_count=2)
    with pytest.raises(DeviceError, match="^rank 3 wants GPU 3 and only 2 are visible$"):
        device_of_rank("cuda", 3, 3)


def check_devices(names):
    world = distributed.start("cpu")
    try:
        distributed.check_own_device(names[world.rank], world)
        print("each has its own")
    except DeviceError as error:
        print(error)


def test_two_ranks_on_one_gpu_are_told_on_both(tmp_path):
    sentence = (
        "ranks 0 and 1 have one GPU between them: start as many processes as there are GPUs (--nproc-per-node), or "
        "show each process its own\n"
    )
    for names, said in ((["GPU-a", "GPU-a"], sentence), (["GPU-a", "GPU-b"], "each has its own\n")):
        codes, output = on_ranks(check_devices, (names,), 2, tmp_path / said[:4])
        assert codes == [0, 0] and output == [said, said]


ENVIRONMENT = "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["PCI_BUS_ID", "expandable_segments:True", "None"]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ["PCI_BUS_ID", "None", "backend:native"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ["PCI_BUS_ID", "", "None"]),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, ["FASTEST_FIRST", "expandable_segments:True", "None"]),
    ],
)
def test_a_script_sets_the_allocator_and_the_order_of_gpus_before_torch_is_loaded(given, expected, tmp_path):
    """Unless the user has: torch reads them once."""
    code = "import os, sys\nfrom harness import endings\nendings.begin_program()\nassert 'torch' not in sys.modules\n"
    code += "".join(f"print(os.environ.get({name!r}))\n" for name in ENVIRONMENT)
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | given
    done = run_program([sys.executable, "-c", code], env=environment)
    assert done.stdout.split("\n")[:-1] == expected, done.stderr


# -- number types --------------------------------------------------------------------------------------------------


def test_bf16_on_a_gpu_that_would_emulate_it(gpu):
    gpu(is_bf16_supported=False, get_device_name="Tesla V100")
    assert device.pick_dtype("auto", GPU) == torch.float16
    sentence = "^--dtype bf16: Tesla V100 does not multiply in it, and would emulate it: use fp16 or fp32$"
    for name, begun_in in (("bf16", None), ("auto", "torch.bfloat16")):
        with pytest.raises(DeviceError, match=sentence):
            device.pick_dtype(name, GPU, begun_in)


@pytest.mark.parametrize(
    ("dtype", "sharded", "offload", "fits"),
    [
        (torch.float16, True, True, False),
        (torch.float16, True, False, True),
        (torch.float16, False, True, True),
        (torch.bfloat16, True, True, True),
    ],
)
def test_fp16_shards_on_the_cpu_would_be_divided_by_a_scale_that_may_not_be_there_yet(dtype, sharded, offload, fits):
    args = Namespace(optimizer="adamw", optimizer_offload=offload)
    if fits:
        optimizers.check_dtype(args, dtype, sharded)
        return
    with pytest.raises(optimizers.OptimizerError) as caught:
        optimizers.check_dtype(args, dtype, sharded)
    assert str(caught.value) == (
        "--optimizer-offload does not go with fp16 where weights are sharded over ranks: use --dtype bf16 or fp32, or "
        "leave it out"
    )


@pytest.fixture
def full_precision():
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


def test_tf32_rounds_products_of_fp32(gpu, full_precision):
    gpu(get_device_capability=(8, 0))
    assert full_precision == "highest"
    device.use_tf32(GPU, torch.float32)
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("world", "capability", "dtype", "sentence"),
    [
        (
            GPU,
            (8, 0),
            torch.bfloat16,
            "--tf32 is for --dtype fp32, and this run computes in bfloat16: leave one of them out",
        ),
        (GPU, (7, 5), torch.float32, "--tf32 needs a GPU that has it (Ampere or newer): leave it out"),
        (
            World(0, 1, torch.device("cpu")),
            None,
            torch.float32,
            "--tf32 needs a GPU that has it (Ampere or newer): leave it out",
        ),
    ],
)
def test_tf32_where_there_is_none(gpu, full_precision, world, capability, dtype, sentence):
    gpu(get_device_capability=capability)
    with pytest.raises(DeviceError) as caught:
        device.use_tf32(world, dtype)
    assert str(caught.value) == sentence and torch.get_float32_matmul_precision() == full_precision


@pytest.mark.parametrize("script", TRAINERS)
def test_a_script_refuses_tf32_on_a_cpu_before_it_writes(script, labelled_world, tmp_path, capsys):
    words = ["--model", labelled_world / "model", *words_of(script, labelled_world), "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        run_script([*words, *QUICK, "--tf32"], __import__(script))
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert one_line(capsys) == f"{script}.py: --tf32 needs a GPU that has it (Ampere or newer): leave it out"


# -- memory --------------------------------------------------------------------------------------------------------


def test_room_is_what_is_free_or_ours_and_not_all_that_the_card_has(gpu):
    gpu(mem_get_info=(7 * GIB, 24 * GIB), memory_reserved=2 * GIB)
    assert device.room(GPU) == 9 * GIB


def test_the_peak_is_a_log_line(gpu):
    gpu(memory_allocated=10**9, max_memory_allocated=3 * 10**9, memory_reserved=4 * 10**9)
    assert memory_report.memory_lines(GPU) == [
        "GPU memory allocated: 1.00 GB",
        "GPU memory allocated, highest so far: 3.00 GB",
        "GPU memory reserved: 4.00 GB",
    ]


@pytest.mark.parametrize(("rows", "rank", "expected"), [(10, 0, [0, 1, 2]), (10, 3, [9]), (2, 3, [])])
def test_shards_of_a_checkpoint_go_where_those_of_the_parameter_are(rows, rank, expected):
    """The shards are kept on the CPU, the ranks' devices are others (`meta` in the place of GPUs): 4 ranks, 10 rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        whole = torch.arange(3.0 * rows).view(rows, 3)
        mesh = DeviceMesh("meta", [0, 1, 2, 3])
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(whole.shape, whole.stride(), whole.dtype))
        parameter = torch.nn.Parameter(DTensor(torch.zeros(len(expected), 3), spec, requires_grad=True))
        shard = checkpoints._as(parameter, whole).to_local()
        assert shard.device.type == "cpu" and torch.equal(shard, whole[expected])
    finally:
        dist.destroy_process_group()


# -- out of memory -------------------------------------------------------------------------------------------------

NEEDS = {  # phase -> what torch is asked for there, and nowhere before; its words in the sentence
    "read": (transformers.PreTrainedModel, "from_pretrained", "while models were loaded"),
    "load": (torch.nn.Module, "to", "while models were loaded"),
    "cache": (score_cache, "tqdm", "while frozen models scored the pairs"),
    "backward": (torch.Tensor, "backward", "in a pass of the training"),
    "step": (torch.optim.AdamW, "step", "in the optimiser's step"),
    "cost": (torch, "searchsorted", "while responses were sampled"),
}


@pytest.fixture
def runs_out(monkeypatch):
    """runs_out(phase): torch has too little memory there, once."""

    def out_of_memory(*_, **__):
        monkeypatch.undo()
        of_card = "GPU 0 has a total capacity of 23.6 GiB of which 1.2 GiB is free."
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {of_card}")

    return lambda phase: monkeypatch.setattr(*NEEDS[phase][:2], out_of_memory)


NOWHERE = {("train_rm", "cache"), ("learn_prompt", "cache")}  # these ask no frozen model
NOWHERE |= {(script, "cost") for script in TRAINERS if script != "train_safe_mm_dpo"}  # and these sample nothing
CASES = [(script, phase) for script in TRAINERS for phase in NEEDS if (script, phase) not in NOWHERE]


@pytest.mark.parametrize(("script", "phase"), CASES)
def test_out_of_memory_is_a_sentence_and_the_last_checkpoint_stays(
    script, phase, labelled_world, tmp_path, runs_out, capsys
):
    out, module = tmp_path / "run", __import__(script)
    words = ["--model", labelled_world / "model", *words_of(script, labelled_world), "--output-dir", out, *QUICK]
    words += ["--cost-every", 1] if phase == "cost" else []
    run_script([*words, "--max-steps", 2, "--save-steps", 1], module)
    before = snapshot(out / "checkpoint-1")
    runs_out(phase)
    capsys.readouterr()
    again = ["--resume", out / "checkpoint-1"]
    again += ["--cache-dir", tmp_path / "cache"] if phase == "cache" else []
    with pytest.raises(SystemExit) as ended:
        run_script([*words, "--max-steps", 2, *again], module)
    assert ended.value.code == 2
    expected = f"{script}.py: there is not enough GPU memory (2.00 GiB more could not be had): it ran out "
    expected += f"{NEEDS[phase][2]}, and the run was estimated to take 0.8N GB of N GB; no flag or pair of flags would "
    expected += "be enough; --resume auto goes on from the last checkpoint"
    assert re.sub(r"(?<= 0\.8)\d(?= GB of)|(?<= of )[\d.]+(?= GB;)", "N", one_line(capsys)) == expected
    assert snapshot(out / "checkpoint-1") == before
