"""The same weights, token ids and order through TRL's RewardTrainer with PEFT and through ours: losses and gradients.

Two starts: the one of train_rm.py (head and lora_B zero) for the curve of 20 updates, and one where adapter and head
are random for the gradients, as with a head of zeros every gradient but the head's is zero.

Without --center-rewards: TRL adds coefficient x (chosen + rejected)^2, which scores of +9 and -9 do not feel;
ours is the mean of the two squares (losses.reward_loss).  The two are not the same number, and nothing compares them.
"""

import pytest
import torch
from runs import metrics_of, run_script
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import distributed
import lora
import train_rm
from formats.model_files import load_model
from losses import reward_loss
from packed_model import prepare_scores
from packing import epoch_plan, pack
from preference_data import load_pairs

STEPS, BATCH, ACCUMULATION, LEARNING_RATE, R, ALPHA, SEED = 20, 4, 2, 1e-2, 4, 8, 42
COUNT = STEPS * BATCH * ACCUMULATION
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


@pytest.fixture(scope="module")
def pairs(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id  # else TRL reads the score before the EOS
    found, _ = load_pairs(toy / "train/helpful_pairs.jsonl", tokenizer, 512, 256, limit=COUNT)
    assert len(found) == COUNT
    assert len({len(pair.chosen_ids) for pair in found}) > 3
    return found


@pytest.fixture(scope="module")
def starts(toy, tmp_path_factory):
    """{name: folder of an adapter with its head}: as train_rm.py begins with SEED, and a random one."""
    folders = {}
    for name in ("fresh", "random"):
        model = load_model(toy / "model", torch.float32, "cpu", scores=True)
        distributed.seed_everything(SEED)
        parameters = [*lora.add_adapter(model, "reward", R, ALPHA), model.score.weight]
        if name == "random":
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in parameters:
                    parameter.normal_(0, 0.05, generator=generator)
        folders[name] = tmp_path_factory.mktemp("starts") / name
        lora.save_adapter(model, "reward", folders[name], str(toy / "model"), head=model.score.weight)
    return folders


@pytest.fixture(scope="module")
def trl_run(toy, starts, pairs, tmp_path_factory):
    """run(start, steps) -> (TRL's log line of each update, {PEFT key: gradient of the first update, not clipped})."""
    datasets, trl, peft = (
        pytest.importorskip(name, reason=f"yardstick {name} not installed") for name in ("datasets", "trl", "peft")
    )
    plan = epoch_plan(range(COUNT), 0, SEED, BATCH, ACCUMULATION, 1)
    order = [index for _, ranks in plan for micro_batch in ranks[0] for index in micro_batch]
    rows = []
    for prompt, chosen, rejected, *_ in (pairs[index] for index in order):
        rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected})

    def run(start, steps):
        tokenizer = AutoTokenizer.from_pretrained(toy / "model")
        options = dict(num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32)
        model = AutoModelForSequenceClassification.from_pretrained(toy / "model", **options)
        model = peft.PeftModel.from_pretrained(model, str(starts[start]), is_trainable=True)
        gradients, lines = {}, []

        class Recorder(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in logs:
                    lines.append(dict(logs))

        class InOrder(trl.RewardTrainer):
            def _get_train_sampler(self, *args, **kwargs):
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                if self.state.global_step == 0:  # the last of these calls leaves the sum over the first update
                    for name, parameter in model.named_parameters():
                        if parameter.requires_grad:
                            key = name.replace(".default", "").replace(".modules_to_save", "")
                            gradients[key] = parameter.grad.clone()
                return loss

        trainer = InOrder(
            model=model,
            args=trl.RewardConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=ACCUMULATION,
                learning_rate=LEARNING_RATE,
                max_steps=steps,
                max_grad_norm=1.0,
                max_length=512,
                logging_steps=1,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Recorder()],
        )
        trainer.train()
        return lines, gradients

    return run


def test_20_updates_have_the_losses_accuracies_margins_and_gradient_norms_of_trl(toy, trl_run, tmp_path, monkeypatch):
    argv = ["--task", "helpful", "--model", toy / "model", "--train-helpful-path", toy / "train/helpful_pairs.jsonl"]
    argv += ["--num-samples", COUNT, "--eval-samples", 0, "--dtype", "fp32", "--device", "cpu", "--seed", SEED]
    argv += ["--batch-size", BATCH, "--gradient-accumulation-steps", ACCUMULATION, "--learning-rate", LEARNING_RATE]
    argv += ["--lora-r", R, "--lora-alpha", ALPHA, "--lora-dropout", 0, "--weight-decay", 0, "--max-grad-norm", 1]
    argv += ["--epochs", 1, "--logging-steps", 1, "--report-to", "none", "--output-dir", tmp_path / "out"]
    run_script(argv, train_rm)
    ours = metrics_of(tmp_path / "out")
    theirs, _ = trl_run("fresh", STEPS)
    assert len(ours) == len(theirs) == STEPS
    losses = [line["loss"] for line in ours]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert min(losses) < 0.6, "the runs have to move for the comparison to mean anything"
    norms = [line["grad_norm"] for line in ours]
    assert norms[0] > 0.01
    assert max(norms) > 1, "the clipping has to be at work somewhere"
    for mine, trls in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(trls["loss"], abs=1e-4)
        assert mine["margin"] == pytest.approx(trls["margin"], abs=1e-4)
        assert mine["accuracy"] == pytest.approx(trls["accuracy"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(trls["grad_norm"], rel=1e-3)
    assert norms[0] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5)


def test_the_gradient_of_every_tensor_and_of_the_head(toy, starts, pairs, trl_run):
    lines, gradients = trl_run("random", 1)
    model = load_model(toy / "model", torch.float32, "cpu", scores=True)
    _, head = lora.load_adapter(model, starts["random"], "reward", trainable=True, with_head=True)
    model.score.weight.data.copy_(head)
    model.score.weight.requires_grad_(True)
    assert prepare_scores(model).startswith("packed pairs: on")
    num_pairs, ranks = epoch_plan(range(COUNT), 0, SEED, BATCH, ACCUMULATION, 1)[0]
    total = 0.0
    for indices in ranks[0]:
        losses = reward_loss(*model.packed_scores(pack([pairs[i] for i in indices])))
        (losses.sum() / num_pairs).backward()
        total += losses.sum().item() / num_pairs
    assert total == pytest.approx(lines[0]["loss"], abs=1e-5)
    assert abs(total - 0.6931472) > 1e-3
    ours = {lora.HEAD_KEY: model.score.weight.grad}
    for path, layer in lora.lora_layers(model).items():
        for part in "AB":
            parameter = getattr(layer, f"lora_{part}")["reward"]
            ours[f"{lora.KEY_PREFIX}{path}.lora_{part}.weight"] = parameter.grad
    assert ours.keys() == gradients.keys()
    for key, gradient in ours.items():
        assert gradient.norm() > 0
        assert (gradient - gradients[key]).norm() <= 1e-4 * gradients[key].norm(), key
