"""Full fine-tuning over ranks: FSDP2's shards take the steps of one process, and a checkpoint of theirs goes on with
any number of ranks.
"""

import gc
import json
import re
import shutil
import weakref
from argparse import Namespace

import pytest
import torch
import transformers
from ranks import on_ranks, run_ranks
from runs import metrics_of, run_script
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import SIZES, random_pairs, tiny_model
from worlds import write_model, write_world

import distributed
import sampling
import train_rm
from harness import optimizers, sharding
from losses import dpo_loss
from packed_model import prepare_model
from packing import pack
from preference_prompt import save_soft_prompt
from sampling import sample

HOW = """--lora-r 0 --dtype fp32 --device cpu --learning-rate 1e-4 --epochs 2 --logging-steps 1 --report-to none
    --max-length 64 --max-prompt-length 32""".split()
SPLITS = {1: (8, 1), 2: (2, 2), 4: (2, 1)}  # ranks: batch size and accumulation, 8 pairs per update
SCRIPTS = "dpo_hf_run", "train_rm", "train_safe_mm_dpo", "train_with_preference_prompt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """write_world's 24 pairs, its model and another one, and two reward models on the first."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "model", folder / "other")
    write_model(folder / "other", seed=1)
    data = [
        f"--{part}-{task}-path={folder}/pairs.jsonl" for part in ("train", "val") for task in ("helpful", "harmless")
    ]
    how = "--dtype fp32 --device cpu --report-to none --learning-rate 1e-3".split()
    save_soft_prompt(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), folder / "soft", "model", "prefix")
    for task in ("helpful", "harmless"):
        where = [f"--model={folder}/model", f"--output-dir={folder}/{task}"]
        run_script([f"--task={task}", *data, *where, *how], train_rm)
    return folder


def run(world, script, ranks, out, *changes):
    """The log of a run that ends well; `out` gets its folder.  22 pairs to train on, of which 2 at most are short:
    the last update of an epoch has fewer pairs than four ranks, or six, and some rank none.
    """
    pairs, (batch, accumulation) = world / "pairs.jsonl", SPLITS[ranks]
    both = [(part, task) for part in ("train", "val") for task in ("helpful", "harmless")]
    own = {
        "dpo_hf_run": [f"--dataset={pairs}", "--num-samples=22", "--eval-samples=4"],
        "train_rm": ["--task=helpful", f"--train-helpful-path={pairs}", f"--val-helpful-path={pairs}"],
        "train_safe_mm_dpo": [f"--{part}-{task}-path={pairs}" for part, task in both]
        + [f"--{task}-rm-path={world / task}" for task in ("helpful", "harmless")],
        "train_with_preference_prompt": [f"--dataset-path={pairs}", "--eval-samples=4"]
        + ["--preference-text=be kind"] * ("--use-prompt-embedding" not in changes),
    }
    words = [f"--model={world / 'model'}", *own[script], *HOW, f"--batch-size={batch}", f"--output-dir={out}"]
    words += [f"--gradient-accumulation-steps={accumulation}", *changes]
    codes, said = run_ranks(script, words, ranks, out.parent / f"{out.name}-said")
    assert set(codes) == {0}, "\n".join(text[-3000:] for text in said)
    assert not any(said[1:]), "rank 0 alone speaks"
    return said[0]


def weights(out):
    return load_file(next(out.glob("*model.safetensors")))  # of a whole model or of an adapter


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_same_lines(ours, theirs):
    ours, theirs = (metrics_of(out) for out in (ours, theirs))
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for key in their:
            assert our[key] == pytest.approx(their[key], abs=1e-4), key


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    """script -> the folder of its run in one process."""
    folder, done = tmp_path_factory.mktemp("one"), set()

    def of(script):
        if script not in done:
            done.add(script)
            run(world, script, 1, folder / script)
        return folder / script

    return of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("script", SCRIPTS)
def test_shards_are_one_process(world, one_process, tmp_path, script, ranks):
    expected = one_process(script)
    log = run(world, script, ranks, tmp_path / "out")
    total = sum(tensor.numel() for tensor in weights(expected).values())
    assert f"Sharded over {ranks} ranks (FSDP2): rank 0 keeps " in log and f" of {total:,} weights" in log
    assert distance(weights(tmp_path / "out"), weights(expected)) < 1e-5
    before = load_file(world / "model/model.safetensors")
    assert max((weights(expected)[name] - before[name]).abs().max() for name in before) > 1e-4, "or nothing has moved"
    assert_same_lines(tmp_path / "out", expected)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def copy_of_checkpoint(run_folder, folder):
    """checkpoint-3 of a run in another folder, with the logs beside it."""
    shutil.copytree(run_folder / "checkpoint-3", folder / "checkpoint-3")
    for log in run_folder.glob("*.jsonl"):
        shutil.copy(log, folder)


def test_a_checkpoint_of_two_ranks_goes_on_with_any_number(world, one_process, tmp_path):
    """Weights, both moments and their count of steps, the schedule, and sums that were not yet logged."""
    each = ["--save-steps=3", "--logging-steps=4", "--warmup-steps=2"]
    run(world, "dpo_hf_run", 2, tmp_path / "2", *each)
    for ranks in (1, 2, 4):
        copy_of_checkpoint(tmp_path / "2", tmp_path / f"from2-{ranks}")
        log = run(world, "dpo_hf_run", ranks, tmp_path / f"from2-{ranks}", *each, "--resume=auto")
        assert "resumed from" in log
        assert distance(weights(tmp_path / f"from2-{ranks}"), weights(tmp_path / "2")) < 1e-6
        assert_same_lines(tmp_path / f"from2-{ranks}", tmp_path / "2")
    exact = (tmp_path / "from2-2/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()
    assert exact, "with the same number of ranks it is the same run bit for bit"


@pytest.mark.parametrize("weights_of", [["--lora-r=4", "--lora-dropout=0"], []], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_run_goes_on_with_another_number_of_ranks(world, tmp_path, script, weights_of):
    """What each rank has of its own is dealt out anew: sums to log, and the window of importance weights."""
    each = [*weights_of, "--save-steps=3", "--logging-steps=4"]
    each += ["--cost-estimate=snis"] * (script == "train_safe_mm_dpo")
    run(world, script, 2, tmp_path / "2", *each)
    for ranks in (1, 4):
        copy_of_checkpoint(tmp_path / "2", tmp_path / f"{ranks}")
        run(world, script, ranks, tmp_path / f"{ranks}", *each, "--resume=auto")
        assert distance(weights(tmp_path / f"{ranks}"), weights(tmp_path / "2")) < 1e-6
        assert_same_lines(tmp_path / f"{ranks}", tmp_path / "2")


def test_another_number_of_pairs_per_update_is_another_run(world, tmp_path, capsys):
    out = tmp_path / "out"
    run(world, "dpo_hf_run", 2, out, "--save-steps=3", "--max-steps=3")
    what = "pairs per update (batch size x accumulation x ranks) was 8 and is 16; start it the same way"
    with pytest.raises(AssertionError, match=re.escape(f"{out}/checkpoint-3 is of another run: {what}")):
        run(world, "dpo_hf_run", 4, out, "--batch-size=4", "--resume=auto")


@pytest.mark.parametrize(
    "script, changes",
    [
        ("dpo_hf_run", ["--ref-model-path={world}/other"]),
        ("dpo_hf_run", ["--gradient-checkpointing=on", "--max-grad-norm=0.5"]),
        ("dpo_hf_run", ["--gradient-checkpointing=off", "--tokens-per-microbatch=40"]),
        ("dpo_hf_run", ["--optimizer-offload"]),
        ("train_safe_mm_dpo", ["--ref-model-path={world}/other", "--combine=soft", "--beta=1"]),
        ("train_with_preference_prompt", ["--lambda-kl=0", "--teacher=ref"]),
        ("train_with_preference_prompt", ["--use-prompt-embedding", "--prompt-embedding-path={world}/soft"]),
    ],
)
def test_levers_and_references_are_sharded_too(world, tmp_path, script, changes):
    changes = [word.format(world=world) for word in changes]
    for ranks in (1, 2):
        run(world, script, ranks, tmp_path / f"{ranks}", *changes, "--max-steps=4")
    assert distance(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-5
    assert_same_lines(tmp_path / "2", tmp_path / "1")


def test_bf16_is_computed_with_and_fp32_is_kept(world, tmp_path):
    run(world, "dpo_hf_run", 2, tmp_path / "fp32", "--save-steps=6")
    run(world, "dpo_hf_run", 2, tmp_path / "bf16", "--save-steps=6", "--dtype=bf16")
    kept = load_file(tmp_path / "bf16/checkpoint-6/training.safetensors")
    assert {kept[name].dtype for name in kept if name.startswith(("parameter", "optimizer"))} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    wide = load_file(tmp_path / "fp32/checkpoint-6/training.safetensors")
    moved = [(wide[name] - kept[name]).abs().max().item() for name in wide if name.startswith("parameter")]
    assert 0 < max(moved) < 1.2e-3, "six steps of AdamW of 1e-4 at most, in directions that bf16 may turn"


def test_bf16_log_probs_of_one_process_are_not_those_of_shards(world, tmp_path):
    """They round elsewhere: with the other's numbers the reference would not be the policy before its first update."""
    for ranks in (1, 2):
        changes = ["--dtype=bf16", f"--cache-dir={tmp_path}", "--max-steps=1"]
        run(world, "dpo_hf_run", ranks, tmp_path / f"{ranks}", *changes)
        first = metrics_of(tmp_path / str(ranks))[0]
        assert first["eval_logps/chosen_change"] == 0 and first["eval_loss"] == pytest.approx(0.693147)


def test_save_merged_of_a_config_for_lora_leaves_no_rank_behind(world, tmp_path):
    (tmp_path / "config.yaml").write_text("save_merged: true\nlora: {r: 8}\n")
    for script in ("dpo_hf_run", "train_rm"):
        log = run(world, script, 2, tmp_path / script, f"--config={tmp_path}/config.yaml", "--max-steps=1")
        assert "saved to" in log and not (tmp_path / script / "merged").exists()


def test_what_is_saved_is_a_model_of_transformers(world, tmp_path):
    run(world, "dpo_hf_run", 2, tmp_path / "out", "--max-steps=2")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys()), "it is the embeddings, which are there"
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and type(model).__name__ == "Qwen3ForCausalLM"


def test_a_model_without_packed_pairs_has_replicas(world, tmp_path):
    """Gemma 2, whose sequences are scored one by one: as many passes on each rank are not to be had."""
    shutil.copytree(world / "model", tmp_path / "gemma")
    config = transformers.Gemma2Config(**SIZES | dict(vocab_size=128, head_dim=8, sliding_window=4))
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    for ranks in (1, 2):
        log = run(world, "dpo_hf_run", ranks, tmp_path / f"{ranks}", f"--model={tmp_path / 'gemma'}", "--max-steps=3")
    assert "Not sharded, as sequences are scored one by one: each of 2 ranks has all of the weights" in log
    assert distance(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-5


# -- what lies where -------------------------------------------------------------------------------------------------


def take_steps(offload):
    """On each of two ranks: what it keeps of weights, gradients and moments; and that an empty pass adds nothing."""
    world = distributed.start("cpu")
    model = tiny_model("mistral")
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    prepare_model(model)
    parameters = sharding.shard(model, model, world, torch.float32, print, offload=offload)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    pairs = random_pairs([(3, 4, 5), (2, 6, 3), (5, 2, 2)])
    for indices in ([0, 1], [2]) if world.rank == 0 else ([], []):
        batch = pack([pairs[i] for i in indices])
        logps = model.packed_logps(batch)
        assert [len(side) for side in logps] == [len(indices)] * 2
        dpo_loss(*logps, torch.zeros(len(indices)), torch.zeros(len(indices)), 0.1)[0].sum().backward()
    twin = tiny_model("mistral")
    prepare_model(twin)
    logps = twin.packed_logps(pack(pairs))
    dpo_loss(*logps, torch.zeros(3), torch.zeros(3), 0.1)[0].sum().backward()
    for ours, plain in zip(parameters, twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), plain.grad, atol=1e-6, rtol=1e-5)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shares = [parameter, parameter.grad, *(v for v in optimizer.state[parameter].values() if v.ndim)]
        assert len(shares) == 4
        for share in shares:
            assert share.to_local().numel() * 2 == whole[name].numel(), name
    with sampling.gathered(model):
        for name, parameter in model.named_parameters():
            assert parameter.shape == whole[name].shape and not hasattr(parameter, "to_local")
            assert (parameter - whole[name]).abs().max() > 5e-4, "the weights after the step, not those before"
        if world.rank == 0:  # as often as this rank has to, without the other
            for _ in range(3):
                model(input_ids=torch.tensor([[1, 2, 3]]))
            tokenizer = Namespace(eos_token_id=1, chat_template=None)
            sample(model, tokenizer, [[1, 2, 3]], max_new_tokens=3, seed=0)  # not in step either
    assert all(hasattr(parameter, "to_local") for parameter in model.parameters())
    distributed.stop()


def test_a_rank_keeps_its_share_and_an_empty_pass_adds_nothing(tmp_path):
    codes, said = on_ranks(take_steps, (False,), 2, tmp_path)
    assert codes == [0, 0], "\n".join(said)


def skip_a_step():
    """On each of two ranks: gradients of fp16, of which one is infinite, in the second rank's share."""
    world = distributed.start("cpu")
    model = tiny_model("mistral")
    prepare_model(model)
    parameters = sharding.shard(model, model, world, torch.float32, print)
    flags = Namespace(learning_rate=1e-3, weight_decay=0.0, optimizer="adamw", optimizer_offload=False)
    optimizer = optimizers.make_optimizer(parameters, flags)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [parameter.full_tensor().clone() for parameter in parameters]
    for infinite in (True, False):
        scaler.scale(sum(model.packed_logps(pack(random_pairs([(3, 4, 5)])))).sum()).backward()
        if infinite and world.rank == 1:
            parameters[-1].grad.to_local()[-1] = torch.inf
        distributed.take_step(parameters, optimizer, scheduler, scaler, 1.0)
        moved = max((p.full_tensor() - b).abs().max().item() for p, b in zip(parameters, before, strict=True))
        expected = (0.0, 512.0, 1e-3) if infinite else (pytest.approx(1e-3, rel=0.01), 512.0, 5e-4)
        assert (moved, scaler.get_scale(), scheduler.get_last_lr()[0]) == expected
    distributed.stop()


def test_an_infinite_gradient_of_one_rank_is_skipped_by_all(tmp_path):
    codes, said = on_ranks(skip_a_step, (), 2, tmp_path)
    assert codes == [0, 0], "\n".join(said)


def give_back():
    """On each of two ranks: the states of a reference can be used outside of it, and it leaves memory when let go."""
    world = distributed.start("cpu")
    model, reference, twin = tiny_model("qwen3"), tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=1)
    for each in (model, reference, twin):
        prepare_model(each)
    sharding.shard(model, reference, world, torch.float32, print)
    batch = pack(random_pairs([(3, 4, 5), (2, 6, 3)]))
    with torch.no_grad():
        ours = model.packed_logps(batch, reference.response_states(batch))
        plain = tiny_model("qwen3")
        prepare_model(plain)
        expected = plain.packed_logps(batch, twin.response_states(batch))
    torch.testing.assert_close(ours, expected)
    assert min(expected[2:][0].min(), expected[3].min()) > 0.01, "there is a KL"
    kept = [weakref.ref(parameter) for parameter in reference.model.layers.parameters()]
    assert all(parameter().to_local().numel() for parameter in kept)
    del reference, each
    gc.collect()
    assert not any(parameter() is not None for parameter in kept)
    distributed.stop()


def test_a_reference_is_used_and_given_back(tmp_path):
    codes, said = on_ranks(give_back, (), 2, tmp_path)
    assert codes == [0, 0], "\n".join(said)
