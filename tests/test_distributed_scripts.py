"""scripts/train_rm_distributed.sh and scripts/train_dpo_distributed.sh: what they print and refuse; ranks that do not
agree, and a rank that dies.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time

import pytest
import torch
from helpers import ROOT
from machines import (
    CONF,
    FOR_ANOTHER,
    NO_GPU,
    NODES,
    ONE_NODE,
    RECORDS,
    SOLO,
    SOME_GPU,
    TORCHRUN,
    PolicyMachine,
    RewardMachine,
    calls,
    write_tool,
)
from processes import end_of, environment, run_program, start
from worlds import write_world

import distributed
import lora
import train_rm
import train_safe_mm_dpo
from formats.model_files import load_model
from harness.checkpoints import new_checkpoint

HELPFUL = "train_rm.py --task helpful --config configs/rm_config.yaml"
HARMLESS = "train_rm.py --task harmless --config configs/rm_config.yaml"
POLICY = "train_safe_mm_dpo.py --config configs/dpo_config.yaml"
EIGHT = f"CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 {ONE_NODE} --nproc-per-node=8"


@pytest.fixture(scope="module")
def reward_machine(tmp_path_factory):
    return RewardMachine(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def policy_machine(tmp_path_factory):
    return PolicyMachine(tmp_path_factory.mktemp("policy"))


# -- the wrappers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, gpus, visible, command",
    [
        ("helpful 8", 8, None, f"{EIGHT} {HELPFUL}"),
        ("harmless 8", 8, None, f"{EIGHT} {HARMLESS}"),
        ("helpful 1", 8, None, f"CUDA_VISIBLE_DEVICES=0 {SOLO} {HELPFUL}"),
        ("helpful 2", 8, "6,3,1", f"CUDA_VISIBLE_DEVICES=6,3 {ONE_NODE} --nproc-per-node=2 {HELPFUL}"),
        ("helpful 3 --device cpu", None, None, f"{ONE_NODE} --nproc-per-node=3 {HELPFUL} --device cpu"),
        ("helpful 3 --device=cpu", 0, None, f"{ONE_NODE} --nproc-per-node=3 {HELPFUL} --device=cpu"),
        ("harmless 8 --learning-rate 3e-5 --epochs 2", 8, None, f"{EIGHT} {HARMLESS} --learning-rate 3e-5 --epochs 2"),
    ],
)
def test_a_reward_model(reward_machine, monkeypatch, words, gpus, visible, command):
    mask = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    line = reward_machine.printed(*words.split(), gpus=gpus, **mask)
    assert line == f"{CONF} {command}"
    monkeypatch.chdir(ROOT)
    args = train_rm.get_args(shlex.split(line.partition("train_rm.py ")[2]))
    assert args.task == words.split()[0]
    assert args.logging_dir == f"logs/training/rm/{args.task}" and args.output_dir == f"models/{args.task}_rm"
    assert args.learning_rate == (3e-5 if "3e-5" in words else 1e-4)


def test_safe_mm_dpo(policy_machine, monkeypatch):
    line = policy_machine.printed("8", "--cache-dir", "a b", gpus=8)
    assert line == f"{CONF} {EIGHT} {POLICY} --cache-dir 'a b'"
    assert policy_machine.printed("--dry-run", "8", gpus=8) == f"{CONF} {EIGHT} {POLICY}"
    monkeypatch.chdir(ROOT)
    args = train_safe_mm_dpo.get_args(shlex.split(line.partition("train_safe_mm_dpo.py ")[2]))
    assert (args.output_dir, args.logging_dir) == ("models/aligned", "logs/training/safe_mm_dpo")
    assert (args.cache_dir, args.beta, args.epochs) == ("a b", 0.1, 2)


def test_node_lists_in_place_of_a_number(reward_machine, policy_machine):
    line = policy_machine.printed("--seed", "1", gpus=4, GPU_NODES="localhost:2,1")
    assert line == f"{CONF} CUDA_VISIBLE_DEVICES=2,1 {ONE_NODE} --nproc-per-node=2 {POLICY} --seed 1"
    assert policy_machine.printed(GPU_NODES="localhost") == f"{CONF} {SOLO} {POLICY}"
    nodes = [f"# on node{n + 1}:\n{CONF} {TORCHRUN} {NODES.format(n)} --nproc-per-node=gpu {HELPFUL}" for n in (0, 1)]
    assert reward_machine.printed("helpful", GPU_NODES="node1@node2") == "\n".join(nodes)


TASK = "the first word is the task, helpful or harmless, and not "
WHICH = "say on how many GPUs, a number, or on which, GPU_NODES=localhost:0,1"
COUNT = "N is a number of GPUs, 1 or more, and not "


@pytest.mark.parametrize(
    "words, gpus, variables, sentence",
    [
        ("", 8, {}, f"{TASK}''"),
        ("8", 8, {}, f"{TASK}'8'"),
        ("helpfull 8", 8, {}, f"{TASK}'helpfull'"),
        ("--seed 1 helpful 8", 8, {}, f"{TASK}'--seed'"),
        ("helpful", 8, {}, WHICH),
        ("helpful --seed 1", 8, {"GPU_NODES": ""}, WHICH),
        ("helpful 0", 8, {}, f"{COUNT}'0'"),
        ("helpful -1", 8, {}, f"{COUNT}'-1'"),
        ("helpful two", 8, {}, f"{COUNT}'two'"),
        ("helpful 2x", 8, {}, f"{COUNT}'2x'"),
        ("helpful 08", 8, {}, f"{COUNT}'08'"),
        ("helpful 99999999999999999999", 8, {}, f"{COUNT}'99999999999999999999'"),
        ("helpful 9", 8, {}, "N is 9, and nvidia-smi counts 8 GPUs: ask for 8 at most"),
        (
            "helpful 3",
            8,
            {"CUDA_VISIBLE_DEVICES": "4,6"},
            "N is 3, and CUDA_VISIBLE_DEVICES=4,6 counts 2 GPUs: ask for 2 at most",
        ),
        (
            "helpful 2",
            8,
            {"GPU_NODES": "localhost:0"},
            "N is 2, and GPU_NODES=localhost:0 is set too: which GPUs? leave one of them out",
        ),
        (
            "helpful",
            2,
            {"GPU_NODES": "localhost:2"},
            "GPU_NODES localhost:2: slot 2 is beyond the 2 GPUs that nvidia-smi counts (from 0)",
        ),
    ],
)
def test_what_is_refused(reward_machine, policy_machine, words, gpus, variables, sentence):
    assert reward_machine.refused(*words.split(), gpus=gpus, **variables) == sentence
    assert reward_machine.refused("--dry-run", *words.split(), gpus=gpus, **variables) == sentence
    if not sentence.startswith(TASK):
        assert policy_machine.refused(*words.split()[1:], gpus=gpus, **variables) == sentence
    assert not (reward_machine.folder / "logs").exists()


@pytest.mark.parametrize("gpus", [0, None])
def test_n_where_no_gpu_is(reward_machine, policy_machine, gpus):
    sentence = f"{NO_GPU}: add --device cpu for N=2 processes on the CPU"
    if gpus is None and SOME_GPU:
        sentence = (
            "no nvidia-smi counts GPUs here: name them, GPU_NODES=localhost:0,1, or add --device cpu for N=2 processes"
        )
    assert reward_machine.refused("helpful", "2", gpus=gpus) == sentence
    assert policy_machine.refused("2", gpus=gpus) == sentence


def test_a_dry_run_needs_no_gpu(reward_machine, policy_machine):
    """The very command that eight GPUs would get, and a note on standard error."""
    note = f"{FOR_ANOTHER}\n"
    code, out, err = reward_machine.run("helpful", "8", "--dry-run", gpus=0)
    assert (code, out, err) == (0, f"{CONF} {EIGHT} {HELPFUL}\n", f"train_rm_distributed.sh: {note}")
    code, out, err = policy_machine.run("--dry-run", "8", gpus=0)
    assert (code, out, err) == (0, f"{CONF} {EIGHT} {POLICY}\n", f"train_dpo_distributed.sh: {note}")
    assert policy_machine.run("--dry-run", "8", gpus=8)[2] == ""


@pytest.mark.parametrize("words", [["--help"], ["helpful", "8", "-h"]])
def test_help_is_what_the_wrapper_begins_with(reward_machine, policy_machine, words):
    for machine in (reward_machine, policy_machine):
        code, out, err = machine.run(*words)
        lines = (ROOT / machine.script).read_text("utf-8").splitlines()
        assert (code, err) == (0, "")
        assert out.splitlines() == [line[2:] for line in lines[1 : lines.index("set -euo pipefail")]]
        assert f"bash {machine.script} 8 --dry-run" in out.replace("helpful 8", "8")


@pytest.mark.parametrize("word, data", [("toy", "toy"), ("/a/model", None)])
def test_a_configs_paths_go_with_its_model(reward_machine, policy_machine, monkeypatch, word, data):
    """--model toy brings the toy world's data, whatever paths the wrapper's config has for another model."""
    monkeypatch.chdir(ROOT)
    reward = shlex.split(reward_machine.printed("helpful", "1", "--device", "cpu", "--model", word))
    args = train_rm.get_args(reward[reward.index("train_rm.py") + 1 :])
    assert args.train_helpful_path == (data or "data/train/helpful_pairs.jsonl")
    assert args.val_helpful_path == (data or "data/val/helpful_pairs.jsonl")
    policy = policy_machine.printed("1", "--device", "cpu", "--model", word, "--val-helpful-path", "mine.jsonl")
    policy = shlex.split(policy)
    args = train_safe_mm_dpo.get_args(policy[policy.index("train_safe_mm_dpo.py") + 1 :])
    assert args.train_harmless_path == (data or "data/train/harmless_pairs.jsonl")
    assert args.val_helpful_path == "mine.jsonl"


@pytest.mark.parametrize(
    "script, path, words",
    [
        ("dpo_hf_run", "dataset", []),
        ("train_rm", "train_harmless_path", ["--task", "harmless"]),
        ("train_safe_mm_dpo", "val_harmless_path", []),
        ("train_with_preference_prompt", "dataset_path", ["--preference-text", "polite"]),
        ("learn_prompt", "test_dataset_path", ["--preference-text", "polite"]),
    ],
)
def test_every_script_lets_a_configs_paths_go_with_its_model(tmp_path, script, path, words):
    """(model in the file, model typed, path typed) -> the path."""
    get_args, config = importlib.import_module(script).get_args, tmp_path / "c.yaml"
    for in_file, typed, expected in [
        ("m", [], "file.jsonl"),
        ("m", ["--model", "toy"], "toy"),
        ("m", ["--base_model_path=toy"] if script == "train_rm" else ["--model=toy"], "toy"),
        ("toy", [], "file.jsonl"),
        ("m", ["--model", "toy", f"--{path}", "typed.jsonl"], "typed.jsonl"),
    ]:
        config.write_text(f"model: {in_file}\n{path}: file.jsonl\n")
        assert vars(get_args(["--config", str(config), *words, *typed]))[path] == expected
    assert vars(get_args(["--model", "toy", *words]))[path] == "toy"


def test_paths_that_stand_beside_model_toy_in_a_config_stay(tmp_path):
    (tmp_path / "toy.yaml").write_text("model: toy\ntrain_helpful_path: mine.jsonl\n")
    args = train_rm.get_args(["--task", "helpful", "--config", str(tmp_path / "toy.yaml")])
    assert (args.train_helpful_path, args.val_helpful_path) == ("mine.jsonl", "toy")


@pytest.mark.parametrize(
    "machine, words, log",
    [
        (RewardMachine, ["harmless", "2"], "logs/training/rm/harmless/train.log"),
        (PolicyMachine, ["2"], "logs/training/safe_mm_dpo/train.log"),
    ],
)
def test_a_run_is_logged_and_its_exit_code_is_the_wrappers(tmp_path, machine, words, log):
    machine = machine(tmp_path)
    machine.make_venv(f"{RECORDS} echo trains; echo complains >&2; exit 3")
    line = machine.printed(*words, gpus=4)
    for _ in range(2):
        assert machine.run(*words, gpus=4) == (3, f"{line}\ntrains\n", "complains\n")
    assert calls(machine)[:3] == ["expandable_segments:True", "0,1", "-m"]
    said = (machine.folder / log).read_text().splitlines()
    assert sorted(said) == sorted(2 * [line, "trains", "complains"])


def test_a_node_that_fails_ends_a_run_that_is_logged(tmp_path):
    machine = PolicyMachine(tmp_path)
    machine.make_venv('if [ "$1" = -c ]; then exit 0; fi; exec sleep 1000')
    write_tool(machine.tools / "ssh", "exit 255")
    code, _, err = machine.run(gpus=1, variables={"GPU_NODES": "here:0@node2:0", "LAUNCH": "ssh"})
    assert code == 255 and "a node ended with exit code 255: the others are ended too\n" in err


# -- ranks that do not agree -------------------------------------------------------------------------------------------

TWO_RANKS = '''
"""Two gloo ranks of each case, forked from a process that has imported the scripts once."""
import importlib, json, os, signal, socket, sys, time, traceback
import torch, transformers
from harness import endings

torch.set_num_threads(1)

class ModelLoads(BaseException):
    pass

def no_model(*_, **__):
    raise ModelLoads

def rank(number, script, words, folder, port, stalls):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(f"{folder}/{number}.err", os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, sys.argv, code = importlib.import_module(script), [f"{script}.py"], 0
    transformers.AutoModelForCausalLM.from_pretrained = no_model
    if stalls and number == 1:
        transformers.AutoTokenizer.from_pretrained = lambda *_, **__: time.sleep(60)
    try:
        endings.run(module.main, module.get_args(words))
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    time.sleep(0.2)  # as a process takes to end, with its connections open
    os._exit(code)

cases, ended = json.load(open(sys.argv[1])), []
for script, of_ranks, folder, stalls in cases:
    importlib.import_module(script)
    os.makedirs(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids, begin = [], time.monotonic()
    for number, words in enumerate(of_ranks):
        pids.append(os.fork())
        if not pids[-1]:
            rank(number, script, words, folder, port, stalls)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])]
    seconds = time.monotonic() - begin
    if stalls:
        os.kill(pids[1], signal.SIGKILL)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1]))
    ended.append((codes, seconds, [open(f"{folder}/{number}.err").read() for number in (0, 1)]))
json.dump(ended, open(sys.argv[2], "w"))
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, pairs, the same pairs elsewhere, in another order, and fewer of them."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "elsewhere.jsonl").write_text("".join(lines))
    (folder / "swapped.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    (folder / "fewer.jsonl").write_text("".join(lines[:-1]))
    for number in (0, 1):
        torch.save(torch.full((2, 32), float(number)), folder / f"soft{number}.pt")
        rm = folder / f"rm{number}"
        rm.mkdir()
        for file in (folder / "model").glob("tok*"):
            (rm / file.name).write_bytes(file.read_bytes())
        record = {"task": "helpful", "base_model": "a", "base_sha256": "", "calibrated": False}
        record |= {"validation": {"score_std": number}}
        (rm / "reward_model.json").write_text(json.dumps(record))
    shutil.copytree(folder / "model", folder / "other")
    with open(folder / "other/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    model = load_model(folder / "model", torch.float32, "cpu")
    for number in (0, 1):
        distributed.seed_everything(number)
        lora.add_adapter(model, f"a{number}", 2, 4, 0.0, None)
        (folder / f"adapter{number}").mkdir()
        lora.save_adapter(model, f"a{number}", folder / f"adapter{number}", "model")
    with new_checkpoint(folder / "resumed", 3, 0) as checkpoint:
        for name in ("training.safetensors", "state.json"):
            (checkpoint / name).write_text("")
    return folder


CASES = {  # script, flags of both ranks, of rank 0, of rank 1, what the one sentence says ("": they agree)
    "places may differ": ("dpo_hf_run", "", "--dataset {w}/pairs.jsonl", "--dataset {w}/elsewhere.jsonl", ""),
    "a rank that does not come": ("dpo_hf_run", "--dataset {w}/pairs.jsonl --ddp-timeout 2", "", "", ""),
    "order": ("dpo_hf_run", "", "--dataset {w}/pairs.jsonl", "--dataset {w}/swapped.jsonl", "data of rank 1 is not"),
    "a flag": (
        "dpo_hf_run",
        "--dataset {w}/pairs.jsonl --eval-samples 2",
        "--save-steps 2",
        "--save-steps 3",
        "save_steps of rank 1 is not that of rank 0 (3, not 2)",
    ),
    "a checkpoint": (
        "dpo_hf_run",
        "--dataset {w}/pairs.jsonl --resume auto",
        "--output-dir {w}/resumed",
        "--output-dir {w}/not_resumed",
        "checkpoint of rank 1 is not that of rank 0 (None, not checkpoint-3)",
    ),
    "the base": (
        "dpo_hf_run",
        "--dataset {w}/pairs.jsonl",
        "",
        "--model {w}/other",
        "the model of --model of rank 1 is not that of rank 0 (",
    ),
    "the reference": (
        "dpo_hf_run",
        "--dataset {w}/pairs.jsonl",
        "--ref-model-path {w}/model",
        "--ref-model-path {w}/other",
        "the model of --ref-model-path of rank 1 is not that of rank 0 (",
    ),
    "an adapter": (
        "dpo_hf_run",
        "--dataset {w}/pairs.jsonl",
        "--adapter {w}/adapter0",
        "--adapter {w}/adapter1",
        "the model of --adapter of rank 1 is not that of rank 0 (",
    ),
    "validation": (
        "train_rm",
        "--task helpful --train-helpful-path {w}/pairs.jsonl",
        "--val-helpful-path {w}/pairs.jsonl",
        "--val-helpful-path {w}/fewer.jsonl",
        "data of rank 1 is not",
    ),
    "helpful rows": (
        "train_safe_mm_dpo",
        "--lambda-init 0 --w 0 --eval-samples 0",
        "--train-helpful-path {w}/fewer.jsonl",
        "--train-helpful-path {w}/pairs.jsonl",
        "data of rank 1 is not",
    ),
    "a reward model": (
        "train_safe_mm_dpo",
        "--lambda-init 0 --eval-samples 0 --train-helpful-path {w}/pairs.jsonl",
        "--helpful-rm-path {w}/rm0",
        "--helpful-rm-path {w}/rm1",
        "helpful reward model of rank 1 is not that of rank 0 ({{'score_std': 1}}, not {{'score_std': 0}})",
    ),
    "a preference": (
        "train_with_preference_prompt",
        "--dataset-path {w}/pairs.jsonl --use-prompt-embedding",
        "--prompt-embedding-path {w}/soft0.pt",
        "--prompt-embedding-path {w}/soft1.pt",
        "preference of rank 1 is not that of rank 0: start all ranks with the same flags, on the same files",
    ),
    "rows of a soft prompt": (
        "learn_prompt",
        "--prompt-init vocab",
        "--dataset-path {w}/pairs.jsonl",
        "--dataset-path {w}/fewer.jsonl",
        "data of rank 1 is not",
    ),
}


@pytest.fixture(scope="module")
def ended(world, tmp_path_factory):
    """{name of a case: (exit codes, seconds until rank 0 ended, standard errors)}"""
    folder, cases = tmp_path_factory.mktemp("ended"), []
    for name, (script, both, *of_ranks, _) in CASES.items():
        common = "--model {w}/model --device cpu --dtype fp32 --report-to none --output-dir {w}/out --ddp-timeout 60"
        words = [f"{common} {both} {own}".format(w=world).split() for own in of_ranks]
        cases.append([script, words, str(folder / name), name == "a rank that does not come"])
    (folder / "cases.json").write_text(json.dumps(cases))
    program = [sys.executable, "-c", TWO_RANKS, folder / "cases.json", folder / "ended.json"]
    done = run_program(program, env=environment())
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads((folder / "ended.json").read_text()), strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1]])
def test_ranks_that_do_not_agree_end_with_one_sentence(ended, name):
    codes, _, errors = ended[name]
    script, sentence = CASES[name][0], CASES[name][-1].format()
    assert codes == [2, 2], errors
    assert errors[0].startswith(f"{script}.py: {sentence}") and errors[0].count("\n") == 1
    assert errors[1] == errors[0], "without a launcher that ends it, the other says it too"


def test_the_same_rows_may_lie_elsewhere(ended):
    codes, _, errors = ended["places may differ"]
    assert codes == [1, 1] and all("ModelLoads" in error for error in errors), errors


def test_a_rank_waits_for_the_others_as_long_as_it_is_told(ended):
    codes, seconds, errors = ended["a rank that does not come"]
    sentence = "dpo_hf_run.py: rank 0 cannot reach another (Timed out waiting 2000ms for "
    assert codes[0] == 1 and errors[0].startswith(sentence), errors[0]
    assert errors[0].endswith("): see what that one said last\n"), "there are no checkpoints to speak of"
    assert 2 <= seconds < 120


# -- a rank that dies --------------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
import dpo_hf_run, torch
from harness import endings

plain, calls = torch.optim.AdamW.step, []
def step(*given, **named):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*given, **named)
torch.optim.AdamW.step = step
endings.run(dpo_hf_run.main, dpo_hf_run.get_args())
"""


def test_a_dead_rank_ends_the_job_within_a_minute_with_a_message(world, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "dies.py"]
    words = f"--model {world}/model --dataset {world}/pairs.jsonl --device cpu --dtype fp32 --report-to none"
    words += " --eval-samples 0 --batch-size 1 --gradient-accumulation-steps 1 --epochs 100 --save-steps 2"
    done = run_program([*torchrun, *words.split(), "--output-dir", "out"], cwd=tmp_path, env=environment())
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert done.returncode == 1
    sentence = r"^dies.py: rank 0 cannot reach another \(.+\): see what that one said last; --resume auto goes on from"
    assert len(re.findall(sentence, done.stderr, re.MULTILINE)) == 1
    assert "Signal 9 (SIGKILL) received" in done.stderr and "exitcode  : -9" in done.stderr
    assert (tmp_path / "out/checkpoint-4/manifest.json").exists()  # from which --resume auto goes on


def test_ranks_whose_launcher_was_killed_save_and_end_within_a_minute(world, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = f"--model {world}/model --dataset {world}/pairs.jsonl --device cpu --dtype fp32 --report-to none"
    words += " --output-dir out --eval-samples 0 --batch-size 1 --gradient-accumulation-steps 1 --epochs 10000"
    words += " --save-steps 20 --save-total-limit 1"
    script = ROOT / "dpo_hf_run.py"
    launched = start([*torchrun, script, *words.split()], cwd=tmp_path, env=environment())
    while not list(tmp_path.glob("out/checkpoint-*")) and launched.poll() is None:
        time.sleep(0.1)
    os.kill(launched.pid, signal.SIGKILL)
    killed = time.monotonic()
    done = end_of(launched)  # of its outputs, which the ranks hold until they end
    assert time.monotonic() - killed < 60
    assert re.search(r"SIGTERM: ended after step \d+, out/checkpoint-\d+ is written", done.stdout)
    assert not (tmp_path / "out/.lock").exists()
