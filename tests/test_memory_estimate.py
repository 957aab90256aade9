"""memory_estimate.py and memory_report.py: every term that a CPU can check against the bytes of real tensors, and
--estimate-memory.
"""

import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
import transformers
from ranks import on_ranks
from runs import run_script
from tiny_models import MISTRAL, flags, random_batch, skeleton_of, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from worlds import write_world

import distributed
import dpo_hf_run
import learn_prompt
import lora
import packed_model
import packed_probe
import train_rm
import train_safe_mm_dpo
import train_with_preference_prompt
from harness import memory_estimate, pass_memory, sharding
from harness.memory_estimate import CUDA, Estimate, EstimateError
from harness.memory_report import GB, compared, first_update, lever, out_of_memory, report
from harness.pass_memory import measure

MODELS = "qwen3", "llama", "gpt2"


def estimate_of(name, lora_r, ranks=1):
    skeleton = skeleton_of(tiny_model(name))
    if lora_r:
        lora.add_adapter(skeleton, "policy", lora_r, 32)
    return Estimate(skeleton, ranks)


def real_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_weights_adapters_gradients_and_optimiser_are_those_of_a_real_update(name, lora_r):
    model = tiny_model(name, torch.bfloat16 if lora_r else torch.float32)
    parameters = lora.add_adapter(model, "policy", lora_r, 32) if lora_r else list(model.parameters())
    packed_model.prepare_model(model)
    sum(packed_model.packed_logps(model, random_batch([(3, 4, 5)]))).sum().backward()
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    rows = estimate_of(name, lora_r, ranks=2 if lora_r else 1).rows(flags(lora_r=lora_r))
    adapters = [p for p_name, p in model.named_parameters() if "lora_" in p_name]
    base = [p for p_name, p in model.named_parameters() if "lora_" not in p_name]
    assert rows["policy weights"] == [real_bytes(base)] * 4
    assert rows["adapters"] == [real_bytes(adapters)] * 4
    assert rows["gradients"][1] == real_bytes(p.grad for p in parameters)
    assert rows["flat gradient"] == [0, 0, 0, rows["gradients"][3] if lora_r else 0]
    assert rows["optimiser"] == [0] + [real_bytes(moments)] * 3
    assert rows["reference"] == [0] * 4, "the policy itself, before its first update or with its adapter off"
    with_kl = estimate_of(name, lora_r).rows(flags(lora_r=lora_r, lambda_kl=0.1))
    assert with_kl["reference"] == [0 if lora_r else real_bytes(base)] * 4


def be_sharded(name):
    """On each rank: the bytes that a rank keeps after an update, and what FSDP2 has asked for in its exchanges."""
    asked = set()

    class Noting:
        def allocate(self, size, *, dtype, device):
            asked.add((type(self).__name__, math.prod(size), dtype.itemsize))
            return super().allocate(size, dtype=dtype, device=device)

    gather, reduce = type("Gather", (Noting, DefaultAllGather), {}), type("Reduce", (Noting, DefaultReduceScatter), {})
    world, model = distributed.start("cpu"), tiny_model(name)
    packed_model.prepare_model(model)
    optimizer = torch.optim.AdamW(sharding.shard(model, model, world, torch.bfloat16, say=lambda *_: None))
    for module in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        module.set_custom_all_gather(gather())
        module.set_custom_reduce_scatter(reduce())
    sum(model.packed_logps(random_batch([(3, 4, 5)]))).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    kept = [model.parameters(), (p.grad for p in model.parameters()), moments]
    found = {"kept": [real_bytes(each.to_local() for each in of) for of in kept], "asked": sorted(asked)}
    print("\n" + json.dumps(found), flush=True)
    distributed.stop()


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_shards_and_what_is_gathered_are_those_of_fsdp2(name, tmp_path):
    """Two ranks.  Sizes that two parts divide: FSDP2 pads the others.  The head of Qwen3 is its embeddings."""
    codes, said = on_ranks(be_sharded, (name,), 2, tmp_path)
    assert codes == [0, 0], said
    model, rows = tiny_model(name), estimate_of(name, 0, ranks=2).rows(flags(lora_r=0))
    block, head = (sum(p.numel() for p in of.parameters()) for of in (model.model.layers[0], model.lm_head))
    rest = sum(p.numel() for p in model.parameters()) - 2 * block
    for found in (json.loads(text.splitlines()[-1]) for text in said):
        assert [rows[row][3] for row in ("policy weights", "gradients", "optimiser")] == found["kept"]
        assert {("Gather", block, 2), ("Gather", rest, 2), ("Reduce", block, 4)} <= {*map(tuple, found["asked"])}
        assert max(numbers for _, numbers, _ in found["asked"]) == max(block, rest)
    assert rows["policy weights"] == [rows["policy weights"][3]] * 4
    assert rows["gathered weights"] == [2 * (rest + 2 * block), 2 * (rest + block), 2 * (rest + 2 * block), 0]
    assert rows["whole gradients"] == [0, 0, 2 * (head + block) + 4 * block, (2 + 4) * rest]
    assert not {"weights cast", "flat gradient"} & rows.keys()


def test_a_sharded_reference_is_there_where_there_is_a_kl():
    estimate = estimate_of("llama", 0, ranks=2)
    without, with_kl = (estimate.rows(flags(lora_r=0, kl_coeff=kl)) for kl in (0, 0.1))
    assert without["reference"] == [0] * 4
    assert with_kl["reference"] == without["policy weights"]
    held = 2 * (2 * 64 * 32 + 32)  # embeddings, head and the last norm, in bf16, all the time
    more = [with_kl["gathered weights"][moment] - without["gathered weights"][moment] for moment in range(4)]
    assert more == [0, held, held, held]


def test_own_pairs_keep_the_reference_and_the_helpful_model(tmp_path):
    skeleton = skeleton_of(tiny_model("llama"))
    estimate = Estimate(skeleton, 1, reward_folders={"harmless": tmp_path, "helpful": tmp_path})
    without, own = (
        estimate.rows(flags(lora_r=0, kl_coeff=0, cost_estimate="policy", own_pairs=share)) for share in (0, 0.25)
    )
    assert without["reference"] == [0] * 4
    assert own["reference"] == own["policy weights"] and min(own["reference"]) > 0
    both = own["reward models"][0]
    assert without["reward models"] == [both, both / 2, both / 2, both / 2]
    assert own["reward models"] == [both] * 4


def test_a_sharded_policy_is_whole_where_it_samples(tmp_path):
    skeleton = skeleton_of(tiny_model("llama"))
    args = flags(lora_r=0, cost_estimate="policy")
    judged, alone = (
        Estimate(skeleton, 2, reward_folders=folders).rows(args)
        for folders in ({"harmless": tmp_path}, {"helpful": tmp_path})
    )
    assert judged["gathered weights"][3] == 2 * sum(p.numel() for p in skeleton.parameters())
    assert judged["reward models"][1] > 0
    assert alone["gathered weights"][3] == alone["reward models"][1] == 0


def test_moments_in_8_bits_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny_model("llama", hidden_size=64, intermediate_size=129)  # tensors of below and above 4,096
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    kept = [s[key] for s in optimizer.state.values() for key in ("state1", "state2", "absmax1", "absmax2") if key in s]
    assert {tensor.dtype for tensor in kept} == {torch.uint8, torch.float32}
    estimate = Estimate(skeleton_of(model))
    rows = estimate.rows(flags(lora_r=0, optimizer="adamw8bit"))
    assert rows["optimiser"] == [0] + [pytest.approx(real_bytes(kept), rel=1e-6)] * 3
    assert rows["optimiser"][3] < 0.4 * estimate.rows(flags(lora_r=0))["optimiser"][3]


@pytest.mark.parametrize("ranks, on_device", [(1, 1), (2, 0)])
def test_an_offloaded_optimizer_takes_nothing_and_sharded_the_weights_go_with_it(ranks, on_device):
    estimate = estimate_of("llama", 0, ranks)
    plain, offloaded = (estimate.rows(flags(lora_r=0, optimizer_offload=off)) for off in (False, True))
    assert plain["optimiser"][3] > 0
    assert offloaded["optimiser"] == [0] * 4
    for row in ("policy weights", "gradients"):
        assert offloaded[row] == [on_device * number for number in plain[row]]
    if ranks == 2:
        assert offloaded["gathered weights"] == plain["gathered weights"]
        assert estimate.rows(flags(lora_r=0, optimizer_offload=True, kl_coeff=0.1))["reference"] == [0] * 4


def test_gradients_of_earlier_passes_are_there_where_an_update_has_some():
    estimate = estimate_of("llama", 0)
    several, one = (estimate.rows(flags(lora_r=0, gradient_accumulation_steps=n))["gradients"] for n in (2, 1))
    model = tiny_model("llama")
    begun = real_bytes([*model.lm_head.parameters(), *model.model.layers[0].parameters()])
    everything = real_bytes(model.parameters())
    assert several == [0, everything, everything, everything]
    assert one == [0, 0, begun, everything]


@pytest.mark.parametrize("trained, with_kl", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name", MODELS)
def test_the_heads_chunk_is_what_real_tensors_take(name, trained, with_kl):
    model = tiny_model(name, vocab_size=2000)  # where what is as long as the tokens hardly counts, as in real ones
    model.requires_grad_(trained)
    num_tokens = 3000
    expected = pass_memory.head_bytes(skeleton_of(model).requires_grad_(trained), num_tokens, torch.float32, with_kl)
    weight = model.get_output_embeddings().weight
    states = torch.randn(num_tokens, weight.shape[1], requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.long)

    def work():
        reference = (states.detach().clone(), weight.detach(), None) if with_kl else None
        packed_model.token_logps(states, weight, targets, None, reference=reference).sum().backward()

    assert pass_memory.most_alive(work) == pytest.approx(expected[0], rel=0.01)
    pieces = min(num_tokens, packed_model.HEAD_CHUNK) * weight.shape[0] * 4
    assert expected[0] > (pieces if not with_kl else 1.5 * pieces)


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_a_real_pass_over_packed_pairs(name, lora_r):
    """Prompts of one token: the pairs that are the longest.  torch's CPU kernel keeps what a fused GPU kernel keeps."""
    model, batch = tiny_model(name), random_batch([(1, 30, 30)] * 2)
    skeleton = skeleton_of(model)
    for each in (model, skeleton):
        if lora_r:
            lora.add_adapter(each, "policy", lora_r, 32)
    packed_model.prepare_model(model)
    own, saved = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = packed_model._packed_hidden(model, batch)
    real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    packed_probe.disable_dropout(skeleton)
    counted = measure(skeleton.float(), states.shape[0])
    assert sum(counted.saved) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(("dtype", "kept_heads"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_each_head_has_keys_of_its_own_where_flash_attention_does_not_run(dtype, kept_heads):
    query, key = torch.empty(1, 4, 6, 8, dtype=dtype, requires_grad=True), torch.empty(1, 2, 6, 8, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        pass_memory._attend(None, query, key, key, None)
    assert [shape[1] for shape in kept if len(shape) == 4] == [4, kept_heads, kept_heads, 4]


@pytest.mark.parametrize("with_kl", [False, True])
def test_beyond_some_chunks_the_head_is_reckoned_and_not_counted(with_kl):
    """To the byte; and at once for more tokens than anything has."""
    estimate, many = estimate_of("qwen3", 4), memory_estimate.MANY
    how = 4, 0.0, torch.float32
    for tokens in (many + 1, 3 * many + 517):
        counted = pass_memory.head_bytes(estimate.model(*how), tokens, torch.float32, with_kl)
        assert estimate.head(*how, tokens, with_kl) == pytest.approx(counted, abs=1)
    assert estimate.head(*how, 10**16, with_kl)[0] > 10**16


def test_twice_the_tokens_take_twice_and_checkpointing_takes_less():
    skeleton = skeleton_of(tiny_model("qwen3"))
    lora.add_adapter(skeleton, "policy", 4, 32)
    once, twice = measure(skeleton, 512), measure(skeleton, 1024)
    assert sum(twice.saved) == pytest.approx(2 * sum(once.saved), rel=0.02)
    assert once.kept(True, False) < once.kept(True, True) < once.kept(False, True)


@pytest.fixture(scope="module")
def mistral():
    with torch.device("meta"):
        return transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL))


def test_a_7b_model_with_lora_fits_where_the_documents_say(mistral):
    estimate = Estimate(mistral)
    rows = estimate.rows(flags(gradient_checkpointing="on"))
    assert rows["policy weights"][0] == pytest.approx(14.5 * GB, rel=0.01)
    assert estimate.total(flags(gradient_checkpointing="on")) < 20 * GB
    full = flags(lora_r=0, gradient_checkpointing="auto")
    assert estimate.total(full) > 80 * GB
    assert "fits no card of these sizes; for 24 GB: " in report(estimate, flags(lora_r=0))
    assert lever(estimate, full, 60 * GB) == "--lora-r 16"


def test_a_7b_model_is_trained_whole_on_eight_devices(mistral):
    """7.24e9 numbers of 4 bytes: weights, gradients and two moments, over 8 ranks."""
    estimate, args = Estimate(mistral, ranks=8), flags(lora_r=0)
    rows = estimate.rows(args)
    assert sum(rows[row][3] for row in ("policy weights", "gradients", "optimiser")) == pytest.approx(
        14.5 * GB, rel=0.01
    )
    assert rows["gathered weights"][2] == pytest.approx(2 * (0.262 + 2 * 0.218) * GB, rel=0.01)
    assert 40 * GB < estimate.total(args) < 64 * GB


def test_a_model_that_takes_no_packed_pairs_is_whole_on_each_device(mistral):
    estimate, args = Estimate(mistral, ranks=8), flags(lora_r=0)
    auto, shards = flags(lora_r=0, gradient_checkpointing="auto"), estimate.total(args)
    assert not estimate.checkpointing(auto, 80 * GB)
    assert estimate.checkpointing(auto, 80 * GB, packs=False)
    assert estimate.total(args) > 110 * GB > 2 * shards
    assert "gathered weights" not in estimate.rows(args)


def test_auto_checkpoints_where_the_run_would_not_fit_without(mistral):
    estimate, auto = Estimate(mistral), flags(gradient_checkpointing="auto")
    plain, saved = (estimate.total(flags(gradient_checkpointing=mode)) for mode in ("off", "on"))
    assert estimate.total(auto) == plain > saved
    assert not estimate.checkpointing(auto, plain / 0.9 + 1e6)
    assert estimate.checkpointing(auto, plain / 0.9 - 1e6)
    assert not estimate.checkpointing(flags(gradient_checkpointing="off"), 1)
    assert estimate.checkpointing(flags(gradient_checkpointing="on"), 1e15)
    assert not estimate.checkpointing(auto, 24 * GB, tokens=512), "short pairs"
    assert estimate.checkpointing(auto, 24 * GB)


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_a_small_model_that_need_not_be_measured_is_small(name, lora_r):
    """Whatever the bound is that saves the measuring: no run is taken to fit that the estimate says does not."""
    estimate = estimate_of(name, lora_r)
    for tokens in (20, 500, 20_000):
        args = flags(lora_r=lora_r, gradient_checkpointing="auto", kl_coeff=0.1)
        assert estimate.checkpointing(args, estimate.total(args, tokens) / 0.9 - 1, tokens)


def test_a_model_that_cannot_be_measured_is_one_sentence_and_auto_goes_by_what_is_trained():
    estimate = estimate_of("bloom", 0)  # its blocks know no attention functions
    with pytest.raises(EstimateError, match=r"^the memory of this model's passes cannot be estimated \(ValueError: "):
        estimate.rows(flags(lora_r=0))
    assert estimate.checkpointing(flags(lora_r=0, gradient_checkpointing="auto"), 1e9)
    assert not estimate.checkpointing(flags(lora_r=0, gradient_checkpointing="auto"), 1e15), "it is small"
    assert not estimate_of("bloom", 4).checkpointing(flags(lora_r=4, gradient_checkpointing="auto"), 1)


def test_the_report_says_where_auto_checkpoints(mistral):
    estimate = Estimate(mistral)
    last = {mode: report(estimate, flags(gradient_checkpointing=mode)).splitlines()[-1] for mode in ("auto", "off")}
    assert last["auto"] == "40.65 GB at most: fits 64, 80, 141 GB and 24, 40 GB, where auto turns checkpointing on"
    assert last["off"].startswith("40.65 GB at most: fits 64, 80, 141 GB; for 24 GB: --batch-size 1 ")
    assert "gradient checkpointing off\n" in report(estimate, flags(gradient_checkpointing="auto"))
    narrow = flags(gradient_checkpointing="auto", batch_size=10)  # 80 GB would be enough, by less than a tenth
    assert 0.9 * 80 * GB < estimate.total(flags(batch_size=10)) < 80 * GB
    assert "fits 141 GB and 24, 40, 64, 80 GB, where" in report(estimate, narrow)
    full = flags(gradient_checkpointing="auto", lora_r=0)
    assert "for 24 GB: --lora-r 16" in report(estimate, full), "with checkpointing, which the user need not ask for"
    assert "--gradient-checkpointing" not in report(estimate, full)


def test_the_first_update_beside_what_was_measured(mistral):
    assert compared(18.54e9, 17.92e9) == "GPU memory of the first update: 18.54 GB predicted, 17.92 GB measured (-3 %)"
    assert compared(2e9, 2.5e9) == "GPU memory of the first update: 2.00 GB predicted, 2.50 GB measured (+25 %)"
    estimate, args = Estimate(mistral), flags(lora_r=0, gradient_checkpointing="auto")
    rows = estimate.rows(flags(lora_r=0))
    head, update = (sum(row[moment] for row in rows.values()) - CUDA for moment in (1, 3))
    assert head > update
    assert estimate.first_update(args, False) == max(head - rows["optimiser"][1], update)  # moments come with the step
    assert estimate.first_update(flags(lora_r=0), True) < head
    lora_args = flags()
    assert estimate.first_update(lora_args, False) < estimate.first_update(lora_args, False, tokens=8192)


@pytest.mark.parametrize(
    "changes, limit, words",
    [
        (dict(), 30, "--batch-size 2 --gradient-accumulation-steps 4"),
        (dict(batch_size=1), 20, "--gradient-checkpointing on"),
        (dict(batch_size=1), 2, None),
        (dict(batch_size=1, lora_r=0, gradient_checkpointing="on"), 90, "--optimizer adamw8bit"),
        (dict(batch_size=1, lora_r=0, gradient_checkpointing="on"), 80, "--optimizer-offload"),
        (dict(batch_size=1, lora_r=0, gradient_checkpointing="on", optimizer="adamw8bit"), 80, "--lora-r 16"),
    ],
)
def test_the_lever_that_is_named_makes_it_fit(mistral, changes, limit, words):
    estimate, args = Estimate(mistral), flags(**changes)
    assert estimate.total(args) > limit * GB
    assert lever(estimate, args, limit * GB) == words
    if words:
        flags_of = [flag.partition(" ") for flag in words.removeprefix("--").split(" --")]
        values = {flag.replace("-", "_"): value for flag, _, value in flags_of}
        found = {name: int(value) if value.isdigit() else value or True for name, value in values.items()}
        assert estimate.total(Namespace(**vars(args) | found)) <= limit * GB


SCRIPTS = {
    dpo_hf_run: ["--dataset", "missing.jsonl"],
    train_rm: ["--task", "helpful"],
    train_safe_mm_dpo: [],
    train_with_preference_prompt: ["--preference-text", "a"],
    learn_prompt: ["--prompt-init", "vocab"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_estimates_from_the_config_alone_and_leaves_nothing(script, tmp_path, monkeypatch, capsys):
    model = write_world(tmp_path / "world") / "model"
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run_script(
        ["--model", bare, *SCRIPTS[script], "--estimate-memory", "--device", "cpu", "--output-dir", "run"], script
    )
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "bfloat16 (--dtype auto on a GPU)" in printed
    assert "fits 24, 40, 64, 80, 141 GB" in printed


def test_the_first_update_on_a_gpu_is_compared_with_the_estimate_of_its_largest_pass(mistral, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 20e9)
    estimate, lengths = Estimate(mistral, ranks=2), [100, 700, 300, 500]
    line = first_update(estimate, flags(), False, [[[0, 1]], [[2, 3], []]], lengths)  # two ranks, 800 tokens each
    predicted = estimate.first_update(flags(), False, 800)
    assert line == (
        f"GPU memory of the first update: {predicted / GB:.2f} GB predicted, 20.00 GB measured "
        f"({round(100 * (20e9 / predicted - 1)):+d} %)"
    )
    assert 15 * GB < predicted < estimate.first_update(flags(), False, 900)
    bloom = first_update(estimate_of("bloom", 0), flags(lora_r=0), False, [[[0]]], lengths)
    assert bloom.startswith(
        "GPU memory of the first update: 20.00 GB measured; the memory of this model's passes cannot "
    )


@pytest.mark.parametrize(("room", "tokens", "checkpointing"), [(24, 8192, True), (40, 2048, False), (80, 8192, False)])
def test_auto_is_the_longest_pass_that_fits_and_checkpoints_only_where_none_does(mistral, room, tokens, checkpointing):
    estimate, auto = Estimate(mistral), flags(gradient_checkpointing="auto")
    assert estimate.auto_pass(auto, "cuda", room * GB) == tokens
    assert estimate.auto_pass(flags(estimate_memory=True), "cpu", 0) == 2048  # what a GPU has at least
    sized = {size: flags(gradient_checkpointing="auto", tokens_per_microbatch=size) for size in (tokens, 2 * tokens)}
    assert estimate.checkpointing(sized[tokens], room * GB) == checkpointing
    for size, fits in ((tokens, True), (2 * tokens, False)):
        vars(sized[size]).update(gradient_checkpointing="on" if checkpointing else "off")
        assert (estimate.total(sized[size]) <= 0.9 * room * GB) == fits


def test_auto_of_a_model_that_cannot_be_measured_is_the_shortest_pass():
    assert estimate_of("bloom", 4).auto_pass(flags(), "cuda", 1) == 2048


def test_out_of_memory_names_the_phase_what_was_estimated_and_flags_that_are_enough(mistral):
    estimate, args = Estimate(mistral), flags(gradient_checkpointing="off")
    total = estimate.total(args)
    # A card that is too small; one that would have been enough: others are on it, or the estimate is wrong.
    for room, limit in ((24 * GB, 0.9 * 24 * GB), (80 * GB, 0.9 * total)):
        said = out_of_memory(estimate, args, "backward", room)
        start = "it ran out in a pass of the training, and the run was estimated to take 40.65 GB of "
        assert said == f"{start}{room / GB:.2f} GB; try {lever(estimate, args, limit)}"
    auto = flags(gradient_checkpointing="auto", batch_size=16)  # which is on there
    said = out_of_memory(estimate, auto, "other", 24 * GB)
    assert said.startswith("the run was estimated to take ") and "--gradient-checkpointing" not in said
    assert said.endswith("of 24.00 GB; try --batch-size 8 --gradient-accumulation-steps 4")
