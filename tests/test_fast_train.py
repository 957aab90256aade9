"""fast_train.sh and scripts/gpu_nodes.sh: the commands they print and start, which GPUs they take, what they refuse.

A folder of fake tools stands for the machine: nvidia-smi that lists GPUs, ssh that runs a command here, a .venv whose
python writes down what it was called with.
"""

import importlib.util
import json
import os
import shlex
import socket
import sys

import pytest
from helpers import ROOT, copy_code
from machines import (
    CONF,
    FOR_ANOTHER,
    NO_GPU,
    NODES,
    NOTE,
    ONE_NODE,
    RECORDS,
    SOLO,
    TORCHRUN,
    Machine,
    calls,
    write_tool,
)
from processes import run_program

import train_with_preference_prompt

LORA = "--lora-r 16 --lora-alpha 32"
TEXT = "请提供一个有用、诚实、无害且简洁的回答。"
DOCUMENTED = (
    "train_with_preference_prompt.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset-path data/train/helpful_pairs.jsonl "
    f"--preference-text '{TEXT}' --beta 0.05 --alpha 0.1 --learning-rate 5e-4 --num-epochs 1 --batch-size 1 "
    f"--gradient-accumulation-steps 512 --dtype auto {LORA} --lora-dropout 0.1 --max-length 300 "
    "--max-prompt-length 128 --output-dir model_output/Preference_Guided_DPO "
    "--logging-dir logs/Preference_Guided_DPO"
)
TOY = (
    "train_with_preference_prompt.py --model toy --dataset-path toy --test-dataset-path toy "
    "--preference-text 'Please answer politely and briefly.' --beta 0.05 --alpha 0.1 --learning-rate 1e-3 "
    f"--num-epochs 1 --batch-size 16 --gradient-accumulation-steps 1 --dtype fp32 {LORA} --lora-dropout 0 "
    "--max-length 300 --max-prompt-length 128 --output-dir outputs/fast_train_toy "
    "--logging-dir outputs/fast_train_toy/logs --overwrite"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine to print commands on: no test writes there."""
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def own_machine(tmp_path):
    return Machine(tmp_path)


def parsed(line):
    """The arguments of the printed command, as the script itself reads them."""
    words = shlex.split(line)
    return train_with_preference_prompt.get_args(words[words.index("train_with_preference_prompt.py") + 1 :])


# -- the command -------------------------------------------------------------------------------------------------------


def test_unedited_without_a_gpu_it_is_the_toy_world(machine):
    assert machine.run("--dry-run") == (0, f"{CONF} {SOLO} {TOY}\n", NOTE)
    assert machine.run("--dry-run", gpus=0) == (0, f"{CONF} {SOLO} {TOY}\n", NOTE)
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
    assert machine.run("--dry-run", gpus=4, variables=hidden) == (0, f"{CONF} {SOLO} {TOY}\n", NOTE)
    assert not (machine.folder / ".venv").exists()


def test_unedited_with_gpus_it_is_the_documents_run_on_all_of_them(machine):
    assert machine.run("--dry-run", gpus=1) == (0, f"{CONF} CUDA_VISIBLE_DEVICES=0 {SOLO} {DOCUMENTED}\n", "")
    four = f"{CONF} CUDA_VISIBLE_DEVICES=0,1,2,3 {ONE_NODE} --nproc-per-node=4 {DOCUMENTED}\n"
    assert machine.run("--dry-run", gpus=4) == (0, four, "")


@pytest.mark.parametrize(
    "launcher, nodes, begins",
    [
        ("", "localhost:1,2", f"CUDA_VISIBLE_DEVICES=1,2 {ONE_NODE} --nproc-per-node=2"),
        ("torchrun", "localhost:2", f"CUDA_VISIBLE_DEVICES=2 {ONE_NODE} --nproc-per-node=1"),
        ("", "localhost:2", f"CUDA_VISIBLE_DEVICES=2 {SOLO}"),
        ("python", "localhost:2", f"CUDA_VISIBLE_DEVICES=2 {SOLO}"),
        ("deepspeed", "localhost:1,2", "deepspeed --include=localhost:1,2"),
        ("deepspeed", "localhost", "deepspeed --include=localhost:0,1,2,3"),
        ("deepspeed", "node1:0,1,node2:0,1", "deepspeed --include=node1:0,1@node2:0,1"),
    ],
)
def test_launchers(machine, launcher, nodes, begins):
    line = machine.printed(gpus=4, LAUNCHER=launcher, GPU_NODES=nodes)
    assert line == f"{CONF} {begins} {DOCUMENTED}"


def test_embedding_mode(machine):
    text = f"--preference-text '{TEXT}'"
    changed = DOCUMENTED.replace(text, "--use-prompt-embedding --prompt-embedding-path '/a b/prompt_embeddings.pt'")
    line = machine.printed(gpus=1, TRAINING_MODE="embedding", PROMPT_EMBEDDING_PATH="/a b/prompt_embeddings.pt")
    assert line == f"{CONF} CUDA_VISIBLE_DEVICES=0 {SOLO} {changed}"
    args = parsed(line)
    assert args.use_prompt_embedding and args.prompt_embedding_path == "/a b/prompt_embeddings.pt"
    assert args.preference_text is None


def test_deepspeed_takes_its_hostfile_and_port_and_the_venvs_own_comes_first(own_machine):
    write_tool(own_machine.folder / ".venv/bin/deepspeed", "")
    nodes = {"LAUNCHER": "deepspeed", "GPU_NODES": "node1:0@node2:0", "HOSTFILE": "/hosts", "RDZV_PORT": "1234"}
    words = ".venv/bin/deepspeed --include=node1:0@node2:0 --hostfile=/hosts --master_port=1234"
    assert own_machine.printed(**nodes) == f"{CONF} {words} {DOCUMENTED}"


AWKWARD = """It's "brief", $HOME `x` & 短\\"""
SETTINGS = [  # variable, its value, the argument, what the script reads
    ("DATASET_PATH", "my pairs.jsonl", "dataset_path", "my pairs.jsonl"),
    ("TEST_DATASET_PATH", "t.jsonl", "test_dataset_path", "t.jsonl"),
    ("PREFERENCE_TEXT", AWKWARD, "preference_text", AWKWARD),
    ("BETA", "0.3", "beta", 0.3),
    ("ALPHA", "0.7", "alpha", 0.7),
    ("LEARNING_RATE", "1e-5", "learning_rate", 1e-5),
    ("NUM_EPOCHS", "3", "epochs", 3),
    ("BATCH_SIZE", "4", "batch_size", 4),
    ("GRADIENT_ACCUM_STEPS", "64", "gradient_accumulation_steps", 64),
    ("DTYPE", "bf16", "dtype", "bf16"),
    ("LORA_R", "8", "lora_r", 8),
    ("LORA_ALPHA", "5", "lora_alpha", 5),
    ("LORA_DROPOUT", "0.2", "lora_dropout", 0.2),
    ("MAX_LENGTH", "500", "max_length", 500),
    ("MAX_PROMPT_LENGTH", "99", "max_prompt_length", 99),
    ("OUTPUT_DIR", "/out", "output_dir", "/out"),
    ("LOGGING_DIR", "/logs", "logging_dir", "/logs"),
]


@pytest.mark.parametrize("model", ["/models/a b", "toy"])
def test_every_setting_may_come_from_the_environment(machine, model):
    settings = {variable: value for variable, value, _, _ in SETTINGS}
    args = vars(parsed(machine.printed(MODEL_PATH=model, **settings)))
    assert args["model"] == model
    assert [args[name] for _, _, name, _ in SETTINGS] == [value for *_, value in SETTINGS]
    assert not args["overwrite"]  # nobody's folder but the toy world's own


def test_one_setting_leaves_the_others(machine):
    assert machine.printed(BETA="0.3") == f"{CONF} {SOLO} {TOY.replace('--beta 0.05', '--beta 0.3')}"
    line = machine.printed(gpus=1, BETA="0.3", BATCH_SIZE="4")
    changed = DOCUMENTED.replace("--beta 0.05", "--beta 0.3").replace("--batch-size 1", "--batch-size 4")
    assert line == f"{CONF} CUDA_VISIBLE_DEVICES=0 {SOLO} {changed}"


def test_a_model_of_ones_own_without_a_gpu_gets_the_documents_settings(machine, own_machine):
    expected = DOCUMENTED.replace("Qwen/Qwen2.5-1.5B-Instruct", "/m")
    assert machine.printed(MODEL_PATH="/m") == f"{CONF} {SOLO} {expected}"
    script = own_machine.folder / "fast_train.sh"
    script.write_text(script.read_text().replace("${MODEL_PATH:-Qwen/Qwen2.5-1.5B-Instruct}", "/m"))
    assert own_machine.printed() == f"{CONF} {SOLO} {expected}"


def test_edits_in_the_file_count_in_the_toy_world_too(own_machine):
    script = own_machine.folder / "fast_train.sh"
    text = script.read_text().replace('"${LEARNING_RATE:-5e-4}"', "2e-3").replace('"${BETA:-0.05}"', "0.5")
    script.write_text(text)
    expected = TOY.replace("--beta 0.05", "--beta 0.5").replace("--learning-rate 1e-3", "--learning-rate 2e-3")
    assert own_machine.printed() == f"{CONF} {SOLO} {expected}"


def test_a_documented_value_that_was_asked_for_counts_in_the_toy_world_too(machine):
    assert machine.printed(LEARNING_RATE="5e-4") == f"{CONF} {SOLO} {TOY.replace('1e-3', '5e-4')}"


def test_the_toy_world_on_gpus(machine):
    assert machine.printed(gpus=1, MODEL_PATH="toy") == f"{CONF} CUDA_VISIBLE_DEVICES=0 {SOLO} {TOY}"
    line = machine.printed(GPU_NODES="localhost:0,1", MODEL_PATH="toy")
    assert line == f"{CONF} CUDA_VISIBLE_DEVICES=0,1 {ONE_NODE} --nproc-per-node=2 {TOY}"


def test_lora_r_0_leaves_the_flags_of_lora_out(machine):
    line = machine.printed(gpus=1, LORA_R="0")
    assert line.endswith(DOCUMENTED.replace(f"{LORA} --lora-dropout 0.1", "--lora-r 0"))
    assert parsed(line).lora_r == 0


def test_further_flags_come_last_and_win(machine):
    line = machine.printed("--beta", "0.4", "--teacher", "ref", "--cache-dir", "a b", gpus=1)
    assert line.endswith(f"{DOCUMENTED} --beta 0.4 --teacher ref --cache-dir 'a b'")
    assert (parsed(line).beta, parsed(line).teacher, parsed(line).cache_dir) == (0.4, "ref", "a b")


@pytest.mark.parametrize(
    "variables, begins",
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64 "),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "PYTORCH_CUDA_ALLOC_CONF='' "),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "PYTORCH_ALLOC_CONF=max_split_size_mb:64 "),
        ({"CUDA_ALLOC_CONF": "max_split_size_mb:64"}, f"{CONF} "),
    ],
)
def test_an_allocator_setting_of_the_user_is_kept(machine, variables, begins):
    assert machine.printed(**variables) == f"{begins}{SOLO} {TOY}"


# -- node lists --------------------------------------------------------------------------------------------------------

TWO_NODES = [f"CUDA_VISIBLE_DEVICES=0,1 {TORCHRUN} {NODES.format(rank)} --nproc-per-node=2" for rank in (0, 1)]


@pytest.mark.parametrize(
    "nodes, gpus, visible, begins",
    [
        ("localhost:1,2", 4, None, [f"CUDA_VISIBLE_DEVICES=1,2 {ONE_NODE} --nproc-per-node=2"]),
        ("localhost:2,1", 4, None, [f"CUDA_VISIBLE_DEVICES=2,1 {ONE_NODE} --nproc-per-node=2"]),
        ("localhost:7", None, None, [f"CUDA_VISIBLE_DEVICES=7 {SOLO}"]),  # nothing counts them
        ("localhost", 3, None, [f"CUDA_VISIBLE_DEVICES=0,1,2 {ONE_NODE} --nproc-per-node=3"]),
        ("127.0.0.1:1,0", 2, None, [f"CUDA_VISIBLE_DEVICES=1,0 {ONE_NODE} --nproc-per-node=2"]),
        ("here:1,0", 2, None, [f"CUDA_VISIBLE_DEVICES=1,0 {ONE_NODE} --nproc-per-node=2"]),
        ("here.lan", 2, None, [f"CUDA_VISIBLE_DEVICES=0,1 {ONE_NODE} --nproc-per-node=2"]),
        ("localhost:0,2", 8, "4,5,6", [f"CUDA_VISIBLE_DEVICES=4,6 {ONE_NODE} --nproc-per-node=2"]),
        ("localhost", 8, "GPU-a,GPU-b", [f"CUDA_VISIBLE_DEVICES=GPU-a,GPU-b {ONE_NODE} --nproc-per-node=2"]),
        ("localhost", 8, "6, 3,-1,2", [f"CUDA_VISIBLE_DEVICES=6,3 {ONE_NODE} --nproc-per-node=2"]),
        ("node1:0,1,node2:0,1", 1, "7", TWO_NODES),  # what is here says nothing of them
        ("node1:0,1@node2:0,1", None, None, TWO_NODES),
        ("node1:3", 1, None, [f"CUDA_VISIBLE_DEVICES=3 {SOLO}"]),
        ("node1:3,2", 1, None, [f"CUDA_VISIBLE_DEVICES=3,2 {ONE_NODE} --nproc-per-node=2"]),
        ("node1", 1, None, [f"{ONE_NODE} --nproc-per-node=gpu"]),
        ("node1@node2", 1, None, [f"{TORCHRUN} {NODES.format(rank)} --nproc-per-node=gpu" for rank in (0, 1)]),
        ("node1:2@here:0", 8, "5", [f"CUDA_VISIBLE_DEVICES={d} {TORCHRUN} {NODES.format(r)} --nproc-per-node=1"
                                    for r, d in enumerate((2, 5))]),
    ],
)  # fmt: skip
def test_a_node_list(machine, nodes, gpus, visible, begins):
    mask = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    out = machine.printed(gpus=gpus, GPU_NODES=nodes, **mask)
    lines = [line for line in out.splitlines() if not line.startswith("# on ")]
    assert lines == [f"{CONF} {begin} {DOCUMENTED}" for begin in begins]
    hosts = [host.partition(":")[0] for host in nodes.replace(",node2", "@node2").split("@")]
    elsewhere = [f"# on {host}:" for host in hosts] if "node1" in nodes else []
    assert out.splitlines()[::2] == (elsewhere or lines)


def test_what_other_machines_have_to_be_told(machine):
    told = {"NCCL_SOCKET_IFNAME": "eth 0", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "secret", "GLOO_X": "y"}
    out = machine.printed(GPU_NODES="node1@node2", RDZV_PORT="1234", **told)
    assert f"{CONF} GLOO_X=y HF_HUB_OFFLINE=1 NCCL_SOCKET_IFNAME='eth 0' {TORCHRUN} --nnodes=2 " in out
    assert out.count("--master-addr=node1 --master-port=1234 ") == 2
    assert "secret" not in out
    assert "NCCL" not in machine.printed(**told)  # a process of this shell has it


@pytest.mark.parametrize(
    "nodes, reason",
    [
        (" ", "has a space"),
        ("localhost:0, 1", "has a space"),
        ("localhost:", "localhost has an empty slot"),
        ("localhost:0,", "localhost has an empty slot"),
        ("localhost:0,,1", "localhost has an empty slot"),
        ("localhost:,1", "localhost has an empty slot"),
        (":0,1", "has an empty host"),
        ("node1:0@", "has an empty host"),
        ("@node1:0", "has an empty host"),
        ("node1:0@@node2:0", "has an empty host"),
        (",node1:0", "has an empty host"),
        ("localhost:a", "a is no slot of localhost"),
        ("localhost:0-2", "0-2 is no slot of localhost"),
        ("localhost:-1", "-1 is no slot of localhost"),
        ("localhost:01", "01 is no slot of localhost"),
        ("localhost:99999999999999999999", "99999999999999999999 is no slot of localhost"),
        ("localhost:1,1", "has slot 1 of localhost twice"),
        ("node1:0,1@node2:3,3", "has slot 3 of node2 twice"),
        ("node1:0@node1:1", "has node1 twice"),
        ("localhost:4", "slot 4 is beyond the 4 GPUs that nvidia-smi counts"),
        ("node1:0@here:4", "slot 4 is beyond the 4 GPUs that nvidia-smi counts"),
        ("node1:0,1@node2:0", "every node has to have as many slots as node1"),
        ("node1:0,1,node2:0", "every node has to have as many slots as node1"),
        ("node1@node2:0", "every node has to have as many slots as node1"),
        ("localhost:0@node2:0", "localhost is another machine on each"),
        ("node1:29500:0,1", "ports and IPv6 addresses have no place in it"),
        ("fe80:0:0:0:0:0:0:1", "ports and IPv6 addresses have no place in it"),
        ("::1", "an IPv6 address cannot be told from slots"),
        ("[::1]:0", "an IPv6 address cannot be told from slots"),
        ("0,1", "0 is a number where a host has to stand"),
        ("localhost,1", "write localhost:1 for a slot"),
        ("-oProxyCommand=x:0", "is no list of hosts and slots"),
        ("-o:0", "a host does not begin as -o does"),
        ("localhost:*", "is no list of hosts and slots"),
        ("$(touch x):0", "has a space"),
        ("$PATH", "is no list of hosts and slots"),
    ],
)
def test_a_node_list_that_is_refused_with_its_reason(machine, nodes, reason):
    sentence = machine.refused(gpus=4, GPU_NODES=nodes)
    assert sentence.startswith("GPU_NODES ") and nodes in sentence and reason in sentence


@pytest.mark.parametrize(
    "gpus, variables, sentence",
    [
        (1, {"TRAINING_MODE": "texts"}, "TRAINING_MODE is text or embedding, not texts"),
        (
            1,
            {"TRAINING_MODE": "embedding"},
            "TRAINING_MODE=embedding needs PROMPT_EMBEDDING_PATH, a soft prompt: learn_prompt.py makes one",
        ),
        (1, {"LAUNCHER": "mpirun"}, "LAUNCHER is torchrun, deepspeed or python, not mpirun"),
        (1, {"LAUNCH": "slurm"}, "LAUNCH is print or ssh, not slurm"),
        (
            4,
            {"LAUNCHER": "python"},
            "LAUNCHER=python is one process, and GPU_NODES localhost is more than one GPU: name one, or use torchrun",
        ),
        (
            1,
            {"LAUNCHER": "deepspeed"},
            "there is no deepspeed: bash setup.sh && .venv/bin/python -m pip install deepspeed, or LAUNCHER=torchrun",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_anything_starts(machine, gpus, variables, sentence):
    assert machine.refused(gpus=gpus, **variables) == sentence


@pytest.mark.parametrize(
    "gpus, variables, sentence",
    [
        (None, {}, "LAUNCHER=deepspeed has to be told the GPUs by number, as in GPU_NODES=localhost:0,1"),
        (
            4,
            {"CUDA_VISIBLE_DEVICES": "GPU-a"},
            "LAUNCHER=deepspeed knows GPUs by number, and CUDA_VISIBLE_DEVICES names them: GPU-a",
        ),
    ],
)
def test_deepspeed_needs_numbers(machine, gpus, variables, sentence):
    assert machine.refused("--dry-run", gpus=gpus, LAUNCHER="deepspeed", **variables) == sentence


@pytest.mark.parametrize(
    "variables",
    [
        {"GPU_NODES": "here:0@node2:0", "LAUNCH": "ssh"},
        {"GPU_NODES": "127.0.0.2:0@node2:0", "LAUNCH": "ssh"},  # an address of this machine
        {"GPU_NODES": "localhost:0,1", "LAUNCHER": "deepspeed"},
    ],
)
def test_a_port_that_is_taken_is_one_sentence_before_anything_starts(own_machine, variables):
    write_tool(own_machine.tools / "python3", f'exec {sys.executable} "$@"')
    for name in ("ssh", "deepspeed"):
        write_tool(own_machine.tools / name, "echo started")
    with socket.create_server(("", 0)) as other:
        variables |= {"RDZV_PORT": str(other.getsockname()[1])}
        sentence = own_machine.refused(gpus=2, **variables)
        assert sentence == (
            f"port {variables['RDZV_PORT']} of this machine is taken, by another run or program: set RDZV_PORT to a "
            "free one"
        )
        own_machine.printed(gpus=2, **variables)  # a dry run needs no port
    own_machine.make_venv('if [ "$1" != -c ]; then echo started; fi')
    code, out, err = own_machine.run(gpus=2, variables=variables)
    assert (code, err) == (0, "") and out.count("started\n") == (1 if "LAUNCHER" in variables else 2)


def test_the_port_of_another_machine_is_not_looked_at(own_machine):
    own_machine.make_venv("exit 98")
    write_tool(own_machine.folder / ".venv/bin/python", f'exec {sys.executable} "$@"')
    write_tool(own_machine.tools / "ssh", "echo started")
    with socket.create_server(("", 0)) as other:
        variables = {"GPU_NODES": "192.0.2.1:0@192.0.2.2:0", "LAUNCH": "ssh"}
        code, out, _ = own_machine.run(variables=variables | {"RDZV_PORT": str(other.getsockname()[1])})
    assert code == 0 and out.count("started\n") == 2


@pytest.mark.parametrize(
    "variables, flags",
    [
        ({"GPU_NODES": "localhost:1,2"}, []),
        ({"GPU_NODES": "localhost:1"}, ["--max-steps", "3"]),
        ({"GPU_NODES": "here:0@node2:0", "LAUNCH": "ssh"}, []),
        ({"GPU_NODES": "localhost:0,1", "LAUNCHER": "torchrun", "MODEL_PATH": "toy"}, []),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_slots_where_no_gpu_is(machine, variables, flags, hidden):
    """Hidden: CUDA_VISIBLE_DEVICES leaves none.  A dry run shows the command for another machine, with a note."""
    mask = {"CUDA_VISIBLE_DEVICES": ""} if hidden else {}
    assert machine.refused(*flags, gpus=0, **variables, **mask) == (
        f"GPU_NODES {variables['GPU_NODES']}: {NO_GPU}: write localhost for one process on the CPU, or start it where "
        "the GPUs are"
    )
    code, out, err = machine.run(*flags, "--dry-run", gpus=0, variables=variables | mask)
    assert (code, err) == (0, f"fast_train.sh: {FOR_ANOTHER}\n") and "train_with_preference_prompt.py" in out
    assert machine.run("--dry-run", gpus=2, variables=variables | {"GPU_NODES": "localhost:0,1"})[2] == ""


def test_slots_on_the_cpu_are_processes_where_that_is_said(own_machine):
    own_machine.make_venv(RECORDS)
    code, out, err = own_machine.run("--device", "cpu", gpus=0, variables={"GPU_NODES": "localhost:1,2"})
    assert (code, err) == (0, "") and "--nproc-per-node=2" in out and out.endswith("--device cpu\n")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_what_the_wrapper_begins_with(machine, word):
    code, out, err = machine.run("--max-steps", "3", word, variables={"TRAINING_MODE": "nonsense", "GPU_NODES": "?"})
    assert (code, err) == (0, "")
    lines = (ROOT / "fast_train.sh").read_text("utf-8").splitlines()
    assert out.splitlines() == [line[2:] for line in lines[1 : lines.index("set -euo pipefail")]]
    assert out.startswith("Preference-guided DPO, edit and run") and "\n  bash fast_train.sh --dry-run  " in out
    assert not (machine.folder / ".venv").exists()


def test_slots_beyond_the_visible_ones(machine):
    sentence = machine.refused(gpus=8, GPU_NODES="localhost:2", CUDA_VISIBLE_DEVICES="4,6")
    assert sentence.endswith("slot 2 is beyond the 2 GPUs of CUDA_VISIBLE_DEVICES=4,6 (from 0)")


# -- runs --------------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_runs_and_what_a_shell_makes_of_it(own_machine):
    own_machine.make_venv(RECORDS)
    settings = {"GPU_NODES": "localhost:2,1", "PREFERENCE_TEXT": AWKWARD}
    code, out, err = own_machine.run("--cache-dir", "a b", gpus=4, variables=settings)
    assert (code, err) == (0, "")
    assert out == own_machine.printed("--cache-dir", "a b", gpus=4, **settings) + "\n"
    ran = calls(own_machine)
    assert ran[:6] == ["expandable_segments:True", "2,1", "-m", "torch.distributed.run", "--standalone", ran[5]]
    assert ran[-2:] == ["--cache-dir", "a b"] and settings["PREFERENCE_TEXT"] in ran
    (own_machine.folder / "called").unlink()
    variables = {"PATH": os.environ["PATH"]}
    assert run_program(["bash", "-c", out], cwd=own_machine.folder, env=variables).returncode == 0
    assert calls(own_machine) == ran


def test_the_exit_code_is_that_of_the_run(own_machine):
    own_machine.make_venv('if [ "$1" = -c ]; then exit 0; fi; exit 3')
    assert own_machine.run()[0] == 3


def test_other_machines_are_left_alone_unless_ssh_is_asked_for(own_machine):
    own_machine.make_venv(RECORDS)
    code, out, err = own_machine.run(variables={"GPU_NODES": "node1:0,1@here:0,1"})
    assert (code, err, out.count("\n")) == (0, "", 4)
    assert not (own_machine.folder / "called").exists()


def test_ssh_starts_every_node_in_the_same_folder(own_machine):
    own_machine.make_venv(RECORDS.replace("called", "called_$CUDA_VISIBLE_DEVICES"))
    write_tool(own_machine.tools / "ssh", """printf '%s ' "${@:1:4}" >>/proc/self/fd/2; cd /; exec bash -c "${@:5}" """)
    settings = {"GPU_NODES": "node1:4,5@here:0,1", "LAUNCH": "ssh", "PREFERENCE_TEXT": "It's brief"}
    code, out, err = own_machine.run("--max-steps", "3", gpus=2, variables=settings)
    assert (code, err) == (0, "-tt -o BatchMode=yes node1 ")
    assert out == own_machine.printed("--max-steps", "3", gpus=2, **settings) + "\n"
    for rank, devices in enumerate(("4,5", "0,1")):
        ran = (own_machine.folder / f"called_{devices}").read_text().split("\0")[:-1]
        assert f"--node-rank={rank}" in ran and "It's brief" in ran and ran[-2:] == ["--max-steps", "3"]


def test_a_node_that_fails_ends_the_others(own_machine):
    own_machine.make_venv('if [ "$1" = -c ]; then exit 0; fi; exec sleep 1000')
    write_tool(own_machine.tools / "ssh", "exit 255")
    code, _, err = own_machine.run(gpus=1, variables={"GPU_NODES": "here:0@node2:0", "LAUNCH": "ssh"})
    assert (code, err) == (255, "fast_train.sh: a node ended with exit code 255: the others are ended too\n")


def test_no_line_evaluates_text_or_asks():
    for name in ("fast_train.sh", "scripts/gpu_nodes.sh"):
        code = [line.partition("#")[0] for line in (ROOT / name).read_text("utf-8").splitlines()]
        words = {word for line in code for word in line.replace(";", " ").split()}
        assert not words & {"eval", "nohup", "read", "select"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="setup.sh would make an environment without pip")
def test_unedited_it_trains_the_toy_world(own_machine, toy):
    copy_code(own_machine.folder)
    (own_machine.folder / "outputs").mkdir()
    (own_machine.folder / "outputs/toy_world").symlink_to(toy)
    own_machine.make_venv(f'exec {sys.executable} "$@"')
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second takes the place of the first
        code, out, err = own_machine.run("--max-steps", "3", "--num-samples", "64", variables=offline)
        assert (code, err) == (0, NOTE)
        assert out.startswith(f"{CONF} {SOLO} {TOY} --max-steps 3 --num-samples 64\n")
    folder = own_machine.folder / "outputs/fast_train_toy"
    args = json.loads((folder / "args.json").read_text())
    assert (args["dataset_path"], args["max_steps"]) == ("outputs/toy_world/train/polite_pairs.jsonl", 3)
    assert (folder / "adapter_model.safetensors").exists()
