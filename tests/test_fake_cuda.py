"""Packed passes and the training scripts on CUDA, without a GPU (fake_cuda.py): no error of device or type, no wait of
the host inside the loop, no kernel that holds tokens x tokens; as many kernels whatever the number of pairs.
"""

import collections

import pytest
import torch
import transformers
from fake_cuda import cuda_without_gpu, on_tested_torch, to_fake_cuda
from runs import run_script
from safetensors.torch import save_file
from tiny_models import random_pairs, tiny_model
from worlds import QUICK, char_tokenizer, data_of

import distributed
import lora
import packed_attention
import packed_model
from formats.model_files import enable_checkpointing
from harness import run, speed, training
from losses import dpo_loss
from packing import pack
from sampling import sample

pytestmark = on_tested_torch
CUDA = torch.device("cuda:0")
VOLTA, AMPERE, HOPPER = (7, 0), (8, 6), (9, 0)
SHAPES = [(9, 5, 4), (7, 3, 8), (12, 6, 6)]
HALF = torch.bfloat16, torch.float16


def update(name, dtype, full=False, checkpointing=False, path="logps", capability=AMPERE, shapes=SHAPES, **changes):
    """Two updates of a tiny model on fake CUDA; the FakeCuda of the second."""
    model = tiny_model(name, torch.float32 if full else dtype, **changes)
    parameters = list(model.parameters()) if full else lora.add_adapter(model, "policy", 4, 8)
    head = torch.randn(1, 32) if path == "scores" else None
    packed_model.prepare_model(model)
    assert model.packs_pairs
    with cuda_without_gpu(capability) as mode:
        moved = {}
        to_fake_cuda(model, mode, moved)
        parameters = [moved[parameter] for parameter in parameters]
        head = None if head is None else mode.fake(head)
        if checkpointing:
            enable_checkpointing(model, draws=False)
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        for _ in range(2):
            for counts in (mode.waits, mode.kernels, mode.attention):
                counts.clear()
            batch = pack(random_pairs(shapes), CUDA)
            with torch.autocast("cuda", dtype, enabled=full and dtype != torch.float32):
                if path == "scores":
                    numbers = packed_model.packed_scores(model, batch, head)
                elif path == "kl":
                    with torch.no_grad(), lora.use_adapter(model, None):
                        reference = model.response_states(batch)
                    numbers = model.packed_logps(batch, reference)
                else:
                    numbers = model.packed_logps(batch)
                chosen, rejected, *divergences = numbers
                losses = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1)[0]
                loss = sum([losses, *divergences]).sum()
            scaler.scale(loss).backward()
            trained = [parameter for parameter in parameters if parameter.grad is not None]
            assert trained and all(parameter.grad.dtype == parameter.dtype == torch.float32 for parameter in trained)
            distributed.take_step(parameters, optimizer, schedule, scaler, 1.0)
    return mode


@pytest.mark.parametrize("path", ["logps", "kl", "scores"])
@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2"])
def test_an_update_in_bf16_waits_for_nothing(name, full, path):
    mode = update(name, torch.bfloat16, full, path == "logps", path)
    assert not mode.waits
    assert not mode.attention and mode.kernels["aten::_flash_attention_forward"] > 0


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "all weights"])
def test_an_update_in_fp16_waits_once_for_whether_it_counts(full):
    (((kind, line), times),) = update("qwen3", torch.float16, full).waits.items()
    assert (kind, line.partition(":")[0], times) == ("read", "distributed.py", 1)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, HOPPER), (torch.float16, VOLTA), (torch.float32, VOLTA)]
)
def test_where_flash_does_not_run_no_kernel_holds_tokens_x_tokens(name, dtype, capability):
    """Nor is a mask copied in each layer: fake attention asserts that."""
    attention = update(name, dtype, capability=capability).attention
    assert attention and {kernel for kernel, _ in attention} == {"efficient"}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_layer_takes_as_many_kernels_whatever_the_number_of_pairs(name, dtype):
    """Of a whole update with LoRA: two pairs or six, in three layers more."""

    def kernels(pairs, layers):
        return update(name, dtype, shapes=[(9, 5, 4)] * pairs, num_hidden_layers=layers).kernels

    layers = {pairs: kernels(pairs, 4) - kernels(pairs, 1) for pairs in (2, 6)}
    assert layers[2] == layers[6] and layers[2]["aten::_flash_attention_forward"] == 3


def test_without_flash_they_grow_with_the_pairs():
    """Else the test above could not fail."""
    totals = [update("qwen3", torch.float32, shapes=[(9, 5, 4)] * pairs).kernels.total() for pairs in (2, 6)]
    assert totals[1] > totals[0] + 40


# -- whole scripts ---------------------------------------------------------------------------------------------------


LOOK = [  # what may wait: log lines, evaluations, checkpoints, the end of an epoch
    *((training.Training, name) for name in ("means", "log", "evaluation", "_save")),
    (speed.Stopwatch, "read"),
    (run.Run, "save_epoch"),
]


@pytest.fixture
def fake_run(labelled_world, monkeypatch, tmp_path):
    """fake_run(script, words ...) -> the FakeCuda of a whole run, which listened in the updates behind the first, up to
    log lines, evaluations and checkpoints.

    Models are loaded, looked at and hashed as real ones on the CPU, and are fake from Run.begin on.
    """
    begin, update_of, modes = run.Run.begin, training.Training._update, []
    plain_to = torch.nn.Module.to

    def stays_real(self, *args, **kwargs):
        to_cuda = args and isinstance(args[0], torch.device) and args[0].type == "cuda"
        return self if to_cuda else plain_to(self, *args, **kwargs)

    def begins_fake(self, model, parameters, frozen=None, **facts):
        parameters = begin(self, model, parameters, frozen, **facts)
        moved = {}
        for one in {model, *(role.model for role in (frozen or {}).values())}:
            to_fake_cuda(one, modes[0], moved)
        for role in (frozen or {}).values():
            if role.head is not None:
                role.head = modes[0].fake(role.head)
        return [moved[parameter] for parameter in parameters]

    def listens(self, passes_of_ranks):
        modes[0].listens = self.step_number > 0
        return update_of(self, passes_of_ranks)

    def deaf(method):
        def call(self, *args, **kwargs):
            modes[0].listens = False
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(torch.nn.Module, "to", stays_real)
    monkeypatch.setattr(run.Run, "begin", begins_fake)
    monkeypatch.setattr(training.Training, "_update", listens)
    for where, name in LOOK:
        monkeypatch.setattr(where, name, deaf(getattr(where, name)))

    def run_fake(script, *words, data=None):
        with cuda_without_gpu() as mode:
            modes[:] = [mode]
            mode.listens = False
            here = [
                "--model",
                labelled_world / "model",
                *(data or data_of(script, labelled_world)),
                "--output-dir",
                tmp_path / "run",
            ]
            quick = [*QUICK, "--device", "cuda", "--max-steps", 4, "--logging-steps", 4, "--eval-steps", 0]
            run_script([*here, *quick, *words], __import__(script))
        return mode

    return run_fake


PASSES = ["--batch-size", 2, "--gradient-accumulation-steps", 2]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("dpo_hf_run", ["--dtype", "bf16"]),
        ("dpo_hf_run", ["--dtype", "bf16", "--gradient-checkpointing", "on", *PASSES]),
        ("dpo_hf_run", ["--dtype", "fp32", "--save-steps", 1]),
        ("dpo_hf_run", ["--dtype", "bf16", "--lora-dropout", 0.1]),
        ("dpo_hf_run", ["--dtype", "bf16", "--lora-r", 0]),
        ("dpo_hf_run", ["--dtype", "bf16", "--tokens-per-microbatch", 200]),
        ("train_rm", ["--dtype", "bf16", "--lora-r", 0]),
        ("train_rm", ["--dtype", "bf16", *PASSES]),
        ("train_safe_mm_dpo", ["--dtype", "bf16", "--cost-every", 100, *PASSES]),
        ("train_safe_mm_dpo", ["--dtype", "bf16", "--combine", "margin", "--cost-every", 100]),
        ("train_with_preference_prompt", ["--dtype", "bf16", *PASSES]),
        ("learn_prompt", ["--dtype", "bf16", *PASSES]),
    ],
)
def test_a_script_waits_for_the_gpu_at_log_lines_alone(script, words, fake_run):
    mode = fake_run(script, *words)
    assert not mode.waits and mode.heard > 300


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("dpo_hf_run", ["--dtype", "fp16"], "read distributed.py"),  # whether the update counts
        # lambda goes on
        ("train_safe_mm_dpo", ["--dtype", "bf16", "--own-pairs", "0", "--cost-estimate", "snis"], "D2H distributed.py"),
    ],
)
def test_where_the_host_has_to_know_it_waits_once_for_each_update(script, words, line, fake_run):
    waits = collections.Counter()
    for (kind, where), times in fake_run(script, *words).waits.items():
        waits[f"{kind} {where.partition(':')[0]}"] += times
    assert waits == {line: 3}


def test_a_soft_preference_waits_for_nothing_either(fake_run, labelled_world, tmp_path):
    vectors = tmp_path / "soft.safetensors"
    save_file({"prompt_embeddings": torch.randn(3, 32)}, vectors)
    data = ["--dataset-path", labelled_world / "train.jsonl", "--test-dataset-path", labelled_world / "val.jsonl"]
    data += ["--use-prompt-embedding", "--prompt-embedding-path", vectors]
    mode = fake_run("train_with_preference_prompt", "--dtype", "bf16", *PASSES, data=data)
    assert not mode.waits and mode.heard > 300


def test_between_log_lines_safe_mm_dpo_waits_where_it_samples_alone(fake_run):
    waits = fake_run("train_safe_mm_dpo", "--dtype", "bf16", "--cost-every", 1).waits
    assert {line.partition(":")[0] for _, line in waits} == {"sampling.py", "expected_cost.py"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_waits_once_for_each_token(temperature, monkeypatch):
    """transformers' generate looks whether all rows have ended.  Ours looks at nothing before the end."""

    def waits(num_tokens):
        model, steps = tiny_model("qwen3", torch.bfloat16), iter(range(num_tokens))
        # A fake token cannot end a row: the test ends them all.
        goes_on = lambda *_, **__: next(steps, None) is not None
        monkeypatch.setattr(transformers.GenerationMixin, "_has_unfinished_sequences", goes_on)
        with cuda_without_gpu() as mode:
            to_fake_cuda(model, mode)
            sample(model, char_tokenizer(), [[5, 6, 7], [9, 8]], num_tokens, seed=0, temperature=temperature)
        return mode.waits

    further = waits(12) - waits(4)
    assert [kind for kind, _ in further] == ["read"] and further.total() == 8


# -- mistakes are seen -----------------------------------------------------------------------------------------------


def test_a_mask_on_the_cpu_is_seen(monkeypatch):
    plain = packed_attention.PairLayout.mask

    def on_cpu(self, queries, keys, reach, like, copies=1):
        like = torch.empty(0, dtype=like.dtype) if like.device.type == "cuda" else like
        return plain(self, queries, keys, reach, like, copies)

    monkeypatch.setattr(packed_attention.PairLayout, "mask", on_cpu)
    with pytest.raises(Exception, match="device"):
        update("qwen3", torch.float32)


def test_a_type_that_does_not_fit_is_seen(monkeypatch):
    plain = lora.FusedLoRA.forward

    def forward(ctx, rows, weight, bias, a, b, scale):
        plain(ctx, rows, weight, bias, a, b, scale)
        return rows @ a.t()  # bf16 times fp32

    monkeypatch.setattr(lora.FusedLoRA, "forward", staticmethod(forward))
    with pytest.raises(RuntimeError, match="dtype"):
        update("qwen3", torch.bfloat16)


def test_a_hidden_wait_is_seen(monkeypatch):
    plain = packed_model._sum_responses

    def sums(numbers, batch):
        if numbers.device.type == "cuda":
            numbers[numbers < 0]  # a boolean mask
            float(numbers.sum())
            torch.ones(3).to(CUDA)
            numbers.cpu()
        return plain(numbers, batch)

    monkeypatch.setattr(packed_model, "_sum_responses", sums)
    assert {kind for kind, _ in update("qwen3", torch.bfloat16).waits} == {"shape", "read", "H2D", "D2H"}
