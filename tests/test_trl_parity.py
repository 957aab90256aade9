"""The same weights, rows and order through TRL's DPOTrainer with PEFT and through ours: losses and gradients agree.

The shared adapter has a random lora_B: with B = 0 the gradient of A is zero, and half of the comparison proves nothing.
"""

import json

import pytest
import torch
from runs import metrics_of, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import lora
from losses import dpo_loss
from packed_model import prepare_model
from packing import epoch_plan, pack
from preference_data import load_pairs

STEPS, BATCH, ACCUMULATION, LEARNING_RATE, BETA = 20, 4, 2, 3e-3, 1.0


@pytest.fixture(scope="module")
def adapter(toy, tmp_path_factory):
    """An adapter that already does something: A and B random."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.add_adapter(model, "random", r=4, alpha=8):
            parameter.normal_(0, 0.05, generator=generator)
    lora.save_adapter(model, "random", folder, str(toy / "model"))
    return folder


@pytest.fixture(scope="module")
def rows(toy):
    """(the rows in the order of our epoch plan, the pairs in file order)."""
    count = STEPS * BATCH * ACCUMULATION
    lines = (toy / "train/helpful_pairs.jsonl").read_text().splitlines()[:count]
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    pairs, _ = load_pairs(toy / "train/helpful_pairs.jsonl", tokenizer, 512, 256, limit=count)
    assert len(pairs) == count
    plan = epoch_plan(range(count), 0, 42, BATCH, ACCUMULATION, 1)
    order = [index for _, ranks in plan for micro_batch in ranks[0] for index in micro_batch]
    return [json.loads(lines[index]) for index in order], pairs


@pytest.fixture(scope="module")
def trl_run(toy, adapter, rows, tmp_path_factory):
    """(loss of each update, {PEFT key: gradient of the first update}) of TRL."""
    datasets, trl, peft = (
        pytest.importorskip(name, reason=f"yardstick {name} not installed") for name in ("datasets", "trl", "peft")
    )
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    gradients, losses = {}, []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if not gradients:
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        gradients[name.replace(".default", "")] = parameter.grad.clone()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    columns = {"prompt": "prompt", "chosen_response": "chosen", "rejected_response": "rejected"}
    trainer = InOrder(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            max_steps=STEPS,
            max_grad_norm=0.0,
            max_length=512,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{columns[key]: row[key] for key in columns} for row in rows[0]]),
        processing_class=AutoTokenizer.from_pretrained(toy / "model"),
        callbacks=[Recorder()],
    )
    trainer.train()
    return losses, gradients


def test_loss_curve_of_20_updates(toy, adapter, rows, trl_run, tmp_path):
    run_script(
        ["--model", toy / "model", "--dataset", toy / "train/helpful_pairs.jsonl", "--adapter", adapter]
        + ["--num-samples", STEPS * BATCH * ACCUMULATION, "--eval-samples", 0, "--dtype", "fp32", "--device", "cpu"]
        + ["--batch-size", BATCH, "--gradient-accumulation-steps", ACCUMULATION, "--learning-rate", LEARNING_RATE]
        + ["--beta", BETA, "--max-grad-norm", 0, "--logging-steps", 1, "--output-dir", tmp_path / "out"]
    )
    ours = [line["loss"] for line in metrics_of(tmp_path / "out")]
    theirs, _ = trl_run
    assert len(ours) == len(theirs) == STEPS
    assert min(ours) < 0.6, "the runs have to move for the comparison to mean anything"
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_gradient_of_every_tensor(toy, adapter, rows, trl_run):
    model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    lora.load_adapter(model, adapter, "ref")
    lora.load_adapter(model, adapter, "policy", trainable=True)
    assert prepare_model(model).startswith("packed pairs: on")

    num_pairs, ranks = epoch_plan(range(len(rows[1])), 0, 42, BATCH, ACCUMULATION, 1)[0]
    for indices in ranks[0]:
        batch = pack([rows[1][i] for i in indices])
        with torch.no_grad(), lora.use_adapter(model, "ref"):
            ref_logps = model.packed_logps(batch)
        losses = dpo_loss(*model.packed_logps(batch), *ref_logps, BETA)[0]
        (losses.sum() / num_pairs).backward()
    theirs = {name: gradient.norm().item() for name, gradient in trl_run[1].items()}
    ours = {}
    for path, layer in lora.lora_layers(model).items():
        ours[f"{lora.KEY_PREFIX}{path}.lora_A.weight"] = layer.lora_A["policy"].grad.norm().item()
        ours[f"{lora.KEY_PREFIX}{path}.lora_B.weight"] = layer.lora_B["policy"].grad.norm().item()
    assert ours.keys() == theirs.keys()
    assert min(ours.values()) > 0
    assert max(abs(ours[name] / theirs[name] - 1) for name in ours) < 1e-5
