"""gpu_check.py without a GPU: what a CPU can check is right, a planted fault is a FAIL, the output names versions."""

import sys

import pytest
import torch
from helpers import ROOT
from processes import run_program
from runs import one_line, run_script

import gpu_check
import packed_attention
import vision
from harness import optimizers
from tools import gpu_load, gpu_numbers, gpu_runs


@pytest.fixture
def check(monkeypatch, capsys):
    """check(parts ...) -> (exit code, what it printed), on the CPU, of one kind of model in fp32."""
    monkeypatch.setattr(gpu_numbers, "KINDS", {"qwen3": gpu_numbers.KINDS["qwen3"]})
    monkeypatch.setattr(gpu_numbers, "DTYPES", {"fp32": torch.float32})

    def run(*parts):
        code = 0
        try:
            run_script(["--device", "cpu", "--only", *parts], gpu_check)
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out

    return run


def test_what_a_cpu_can_check_is_right_and_versions_are_named(check):
    code, said = check("machine", "kernels", "numbers", "pictures", "steps", "waits", "memory", "speeds")
    assert code == 0
    assert f"torch {torch.__version__}, transformers " in said and ", Python 3." in said and "\nbitsandbytes " in said
    kinds = "qwen3", "llava", "qwen2-vl"
    numbers = [f"{kind} fp32: {what}" for kind in kinds for what in ("log-probs", "gradients", "checkpointing")]
    for what in ("attention in fp32, from fp64", *numbers, "AdamW "):
        assert f"\nok    {what}" in said, what
    assert ", 0 failed, 0 slow, " in said.splitlines()[-1]


@pytest.mark.parametrize("run", [*gpu_load.RUNS, ("four roles",)], ids=lambda run: run[0])
def test_what_each_update_will_take_is_estimated_and_fits_the_card_it_is_tried_on(run):
    """On the meta device: what no CPU has the memory for."""
    if run[0] == "four roles":
        model, how, size = gpu_load.MISTRAL, gpu_load.FOUR_ROLES, 18
    else:
        _, model, full, checkpointing, size = run
        how = dict(full=full, checkpointing=checkpointing)
    config = gpu_load.config_of(model)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in gpu_load.build(config).parameters())
    least = weights * (16 if how["full"] else 2)  # weights, gradients, moments in fp32; or weights in bf16
    assert least < gpu_load.predicted(config, **how) < size * gpu_load.GB


def test_a_rejected_response_that_sees_the_chosen_one_is_a_fail(check, monkeypatch):
    plain = packed_attention.cut_pairs

    def leaking(x, segments, borders):  # the end of the prompt, for keys, is the end of the chosen response
        return plain(x, segments, [segment.rejected_start for segment in segments])

    monkeypatch.setattr(packed_attention, "cut_pairs", leaking)
    code, said = check("numbers")
    assert code == 1 and "\nFAIL  qwen3 fp32 " in said


def test_exchanged_pictures_are_a_fail(check, monkeypatch):
    """In bf16 too, by the gradients: log-probs of random weights depend on a picture less than bf16 rounds."""
    monkeypatch.setattr(gpu_numbers, "DTYPES", {"fp32": torch.float32, "bf16": torch.bfloat16})
    plain = vision._joined

    def exchanged(features, device):  # the pictures of a row, which one by one are not joined
        return plain(features, device) if isinstance(features[0], torch.Tensor) else plain(features[::-1], device)

    monkeypatch.setattr(vision, "_joined", exchanged)
    code, said = check("pictures")
    assert code == 1
    for kind in gpu_numbers.SEEING:
        for what in ("fp32: log-probs", "fp32: gradients", "bf16: gradients"):
            assert f"\nFAIL  {kind} {what} " in said


def test_positions_of_text_where_pictures_have_their_own_are_a_fail(check, monkeypatch):
    monkeypatch.setattr(vision, "positions", lambda backbone, batch: batch.position_ids)
    code, said = check("pictures")
    assert code == 1
    assert "\nFAIL  qwen2-vl fp32: log-probs " in said and "\nok    llava fp32: log-probs " in said


def test_an_optimiser_with_another_rate_is_a_fail_and_the_other_parts_still_speak(check, monkeypatch):
    plain = optimizers.make_optimizer

    def faster(parameters, args):
        args.learning_rate *= 1.01
        return plain(parameters, args)

    monkeypatch.setattr(optimizers, "make_optimizer", faster)
    code, said = check("steps", "machine")
    assert code == 1 and "\nFAIL  AdamW " in said and "\n-- machine\n" in said


def test_a_part_that_breaks_is_a_fail_of_one_line(check, monkeypatch):
    monkeypatch.setitem(gpu_check.CHECKS, "waits", lambda report, device: 1 / 0)
    code, said = check("waits", "machine")
    assert code == 1 and "\nFAIL  waits                                ZeroDivisionError: division by zero\n" in said


def test_a_script_that_ends_early_is_a_fail_with_the_end_of_what_it_said(check, monkeypatch):
    monkeypatch.setattr(gpu_runs, "DPO", ["dpo_hf_run.py", "--dataset", "nowhere.jsonl"])
    monkeypatch.setattr(gpu_runs, "SHORT", ["--no-such-flag"])
    code, said = check("scripts")
    assert code == 1 and "\nFAIL  resume " in said and "nowhere.jsonl" in said and "unknown flag --no-such-flag" in said


def test_without_a_gpu_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run_script([], gpu_check)
    assert ended.value.code == 2
    sentence = "--device cuda: torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    assert one_line(capsys) == f"gpu_check.py: {sentence}"


def test_help_needs_no_torch():
    code = "import runpy, sys\nsys.argv = ['gpu_check.py', '--help']\n"
    code += "try:\n    runpy.run_path('gpu_check.py', run_name='__main__')\n"
    code += "except SystemExit:\n    print('torch' in sys.modules)\n"
    done = run_program([sys.executable, "-c", code], cwd=ROOT)
    assert done.stdout.endswith("\nFalse\n") and "--only" in done.stdout
