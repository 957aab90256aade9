"""--compile.  What needs torch's compiler stands in compiled_blocks.py and runs in a process of its own: in one where
hundreds of other tests have run, the compiler is not always found.
"""

import sys

import pytest
from helpers import ROOT
from processes import environment, run_program
from torch import nn

from harness import compiled

CASES = ["same_gradients", "dropout", "base_in_4_bits", "learns_the_same"]


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks(case):
    cases = ROOT / "tests/compiled_blocks.py"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases, "-k", case]
    done = run_program(words, 580, env=environment(PYTEST_ADDOPTS=""), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_no_case_is_left_out():
    text = (ROOT / "tests/compiled_blocks.py").read_text("utf-8")
    names = [line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def test_")]
    assert len(names) == len(CASES) and all(sum(case in name for name in names) == 1 for case in CASES)


def test_a_model_without_blocks_goes_on_without():
    line = compiled.compile_blocks(nn.Linear(2, 2), recomputes=False, draws=False)
    assert line == "--compile: this model has no blocks that transformers can run in another way: goes on without"


def test_without_a_compiler_a_run_goes_on_and_says_so(world, tmp_path):
    words = [sys.executable, ROOT / "dpo_hf_run.py", "--model", world / "model", "--dataset", world / "pairs.jsonl"]
    words += ["--device", "cpu", "--dtype", "fp32", "--max-steps", 1, "--eval-samples", 0, "--report-to", "none"]
    words += ["--output-dir", tmp_path / "run", "--compile"]
    nothing = environment(CXX="/no/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = run_program(words, env=nothing)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("--compile")]
    assert line.startswith("--compile: torch finds no compiler here (") and line.endswith("): goes on without")
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
