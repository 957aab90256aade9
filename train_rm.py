"""Train a reward model: a score for each response, higher for the chosen one of every pair.

    loss = -logsigmoid(s(chosen) - s(rejected))                                       Bradley-Terry, arXiv:1706.03741
    --task harmless adds, for rows with labels,
           weight * [-logsigmoid(z s(chosen)) - logsigmoid(z s(rejected))]    arXiv:2310.12773 Eq. 6 with score = -cost

s is a linear map of the hidden state of a response's last token.  z is +1 for a response labelled safe and -1 for a
harmful one: ranking and labels pull one way, higher is safer, and the labels alone give the score its zero (a harmless
score above 0 means safe).  The head starts at zero: the first ranking loss is ln 2 = 0.6931.

Deviations: the label terms are per row, so rows without labels train the ranking alone; weight 1 as in the paper.

    python train_rm.py --task harmless --model toy --learning-rate 1e-3                        # laptop, offline
    python train_rm.py --task helpful --config configs/rm_config.yaml                          # one GPU
    torchrun --nproc_per_node=8 train_rm.py --task harmless --config configs/rm_config.yaml    # eight GPUs

Copy with: formats/ harness/ distributed.py lora.py lora_targets.py losses.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py reward_models.py toy_vision.py toy_world.py vision.py
"""

import json

from harness import endings, flags, training_flags

TASKS = "helpful", "harmless"
TOY = {f"{part}_{task}_path": f"{part}/{task}_pairs.jsonl" for part in ("train", "val") for task in TASKS}


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    positive = flags.number(float, least=0)
    add = parser.group("model")
    add("--task", choices=TASKS, help="which of the two reward models: has to be given")
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help="base: folder, hub id or `toy`, data too")
    add("--tokenizer-name", metavar="DIR", help="tokenizer, where it is not the model's")
    add = parser.group("data")
    for name, file in TOY.items():
        task = name.split("_")[1]
        what = f"pairs of --task {task}, or `toy`"
        add(f"--{name.replace('_', '-')}", default=f"data/{file}", metavar="FILE", help=what)
    add = parser.group("method")
    add("--classification-loss-weight", type=positive, metavar="W", help="of the label terms (default: 1 for harmless)")
    add("--center-rewards", type=positive, default=0.0, metavar="G", help="adds G x the mean squared score to the loss")
    documented = dict(batch_size=4, gradient_accumulation_steps=2, learning_rate=2e-5, lora_dropout=0.1)
    what = "rows of the validation file; 0: none (default: all)"
    training_flags.add_common_flags(parser, **documented, held_out=what, output_dir=None)
    args = training_flags.parse(parser, argv)
    if args.task is None:  # not argparse's `required`, which would want it in a --config file too
        parser.error("--task helpful or --task harmless has to be given")
    if args.task == "helpful" and args.classification_loss_weight:
        parser.error("--classification-loss-weight is for --task harmless: helpful rows have no labels of harm")
    if "cache_dir" in args.typed:
        parser.error("--cache-dir has no effect here (no frozen model is scored): leave it out")
    training_flags.take_toy(args, f"train_{args.task}_path", f"val_{args.task}_path")
    if args.classification_loss_weight is None:
        args.classification_loss_weight = float(args.task == "harmless")
    args.output_dir = args.output_dir or f"models/{args.task}_rm"
    args.logging_dir = args.logging_dir or f"logs/training/rm/{args.task}"
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch

import distributed
import lora
import reward_models
from formats.model_files import pad_unlike_ends, save_whole
from harness import run_files, sharding
from harness.run import Run
from harness.score_cache import base_sha256
from harness.training import Training
from losses import harm_label_loss, reward_loss
from packed_model import prepare_scores
from packing import send
from preference_data import fingerprint

METRICS = dict.fromkeys("loss ranking_loss accuracy margin chosen_score rejected_score".split(), "pairs")
SHOWN = "loss accuracy margin grad_norm".split()
NEW_EPOCH = {"epoch_loss": 0.0, "epoch_pairs": 0}  # sums of an epoch that has begun
SHOWN_OF_VALIDATION = "margin score score_std safe_sign_accuracy harmful_sign_accuracy auroc brier".split()


def pair_losses(model, batch, labels, args):
    """Losses of a packed batch (B,), and its METRICS {name: (B,)}; labels (B, 2) of chosen and rejected."""
    chosen_scores, rejected_scores = model.packed_scores(batch)
    losses = ranking_losses = reward_loss(chosen_scores, rejected_scores, args.center_rewards)
    if args.classification_loss_weight:
        label_losses = harm_label_loss(chosen_scores, rejected_scores, labels)
        losses = ranking_losses + args.classification_loss_weight * label_losses
    margin = chosen_scores - rejected_scores
    metrics = {"loss": losses, "ranking_loss": ranking_losses, "accuracy": margin > 0, "margin": margin}
    return losses, metrics | {"chosen_score": chosen_scores, "rejected_score": rejected_scores}


def harm_labels(pairs, train, args, say):
    """Labels of harm (N, 2) in +1 (harmful), -1 (safe), 0 (none), and whether they give the score its zero."""
    labels = [pair.labels if args.task == "harmless" and pair.labels else (0, 0) for pair in pairs]
    labels = torch.tensor(labels, dtype=torch.float32)
    calibrated = bool(args.classification_loss_weight) and {1, -1} <= set(labels[train].flatten().tolist())
    if args.classification_loss_weight:
        say(f"{int(labels[train].abs().amax(1).sum()):,} of {len(train):,} pairs to train on have labels of harm")
        if not calibrated:
            say("Without labels of both kinds the score's zero means nothing (calibrated: false)")
    return labels, calibrated


@torch.no_grad()
def validate(forward, data, labels, world):
    """The held-out losses and reward_models.score_statistics, {name: number}; every rank scores its share.

    forward(indices): as in `main`.
    """
    losses = torch.zeros(2, dtype=torch.float64)  # sums of loss and ranking_loss
    scores = torch.zeros(len(data.pairs), 2, dtype=torch.float64)  # of chosen and rejected
    for indices in data.passes(data.held_out):
        metrics = {name: values.cpu().double() for name, values in forward(indices)[1].items()}
        losses += torch.stack((metrics["loss"].sum(), metrics["ranking_loss"].sum()))
        scores[indices] = torch.stack((metrics["chosen_score"], metrics["rejected_score"]), dim=1)
    losses = distributed.all_reduce_sum(losses, world) / len(data.held_out)
    scores = distributed.all_reduce_sum(scores, world)[data.held_out]
    result = dict(zip(("loss", "ranking_loss"), losses.tolist(), strict=True))
    result |= reward_models.score_statistics(scores, labels[data.held_out])
    result["accuracy_ci95"] = 1.96 * (result["accuracy"] * (1 - result["accuracy"]) / len(data.held_out)) ** 0.5
    return result


def save_model(folder, model, tokenizer, record, state=None, reader=None):
    """The adapter with its head in PEFT's format or, of a `state`, transformers' whole model; and reward_model.json.

    reader: a PictureReader of a model that sees, or None.
    """
    if state:
        model.config.pad_token_id = record["pad_token_id"]
        save_whole(model, folder, state)
    else:
        lora.save_adapter(model, "reward", folder, record["base_model"], model.score.weight)
    if reader:
        reader.save(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(record["pad_token_id"])
    tokenizer.save_pretrained(folder)
    record = record | {"sha256": reward_models.files_sha256(folder)}
    (folder / "reward_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def log_validation(validation, training, args):
    """metrics.jsonl and two lines of the log.  Raises NonFinite for a loss that is not a number."""
    flags.check_held_out(validation["loss"], training.step_number)
    training.write({f"eval_{name}": value for name, value in validation.items()})
    line = f"[{args.task}] Epoch {training.epoch}/{args.epochs}"
    if training.step_number:
        line += f" train_loss={training.state['epoch_loss'] / training.state['epoch_pairs']:.4f}"
    training.run.say(f"{line} val_loss={validation['loss']:.4f} val_acc={validation['accuracy']:.4f}")
    words = [f"{name}={validation[name]:.4f}" for name in SHOWN_OF_VALIDATION if name in validation]
    training.run.say(f"  {' '.join(words)}")


def save_best(run, model, tokenizer, record):
    """The model as it is now, to --output-dir, in place of the one that was the best before."""
    validation, state = record["validation"], run.whole_state(model)
    if run.world.is_main:
        loss = f"val_loss={validation['loss']:.4f}" if validation else "no validation: the last one"
        run.say(f"Saving best model to {run.args.output_dir} ({loss})")
        with run_files.whole_files(run.args.output_dir) as folder:
            save_model(folder, model, tokenizer, record, state, run.reader)


def main(args):
    # 1 setup
    run = Run(args, __file__, TOY)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = run.load_tokenizer()
    skeleton = run.skeleton(tokenizer, scores=True)
    run.add_adapter(skeleton, "reward")  # a wrong target shows here
    if run.estimate_memory(skeleton, tokenizer):
        return
    train_path, val_path = (getattr(args, f"{part}_{args.task}_path") for part in ("train", "val"))
    pairs, train, held_out = run.read_pairs(train_path, val_path, tokenizer)
    labels, calibrated = harm_labels(pairs, train, args, run.say)
    data = run.plan(pairs, train, held_out)

    # 3 the model: a language model's backbone and a new head, which starts at zero
    model = run.load(args.model, scores=True)
    parameters = run.add_adapter(model, "reward")
    if not run.full:
        parameters.append(model.score.weight.requires_grad_(True))
    run.prepare(model, prepare_scores)
    record = {  # reward_model.json
        "task": args.task,
        "sign": "a higher score is better" if args.task == "helpful" else "a higher score is safer; cost = -score",
        "calibrated": calibrated,
        "base_model": args.model,
        "base_sha256": base_sha256(model),
        "data_sha256": data.train_sha256,
        "pad_token_id": pad_unlike_ends(args.model, tokenizer, model.config),
    } | data.how_pictures_are_made()
    validation_data = fingerprint([pairs[i] for i in held_out])  # it decides which epoch is the best
    parameters = run.begin(model, parameters, **{"validation data": validation_data})

    # 4 train
    training = Training(run, model, parameters, METRICS, "", state={"saved_step": 0, "saved": None, **NEW_EPOCH})
    state = training.state  # saved_step, saved: the update and the validation of the model that is in --output-dir
    if run.checkpoint and state["saved_step"] and not run_files.goes_on(args, run.checkpoint):
        run.say(f"The best model so far is in {run.checkpoint.parent}: {args.output_dir} gets the best from here on")
        state["saved"] = None

    def forward(indices):
        """Losses (B,) and metrics of the pairs at these places."""
        with run.autocast:
            return pair_losses(model, data.batch(indices), send(labels[indices], run.world.device), args)

    def evaluate():
        """The validation {name: number}, which the log gets; {} where nothing is held out."""
        if not held_out:
            return {}
        model.eval()
        validation = validate(forward, data, labels, run.world)
        model.train()
        log_validation(validation, training, args)
        return validation

    if not run.checkpoint:
        evaluate()
    for update in training.updates():
        for indices in update.passes:
            losses, metrics = forward(indices)
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            training.backward(losses.sum() / update.num_pairs, metrics)
        training.all_reduce_gradients()
        training.step()
        ends_epoch = update.ends_epoch or update.is_last
        evaluates = update.evaluates or ends_epoch
        if update.logs or evaluates:
            training.log(training.means(), SHOWN, prefix=f"[{args.task}] ")
            state["epoch_loss"] += training.totals["loss"]
            state["epoch_pairs"] += training.totals["pairs"]
        if evaluates:
            validation = evaluate()
            flags.check_weights(parameters, update.number)
            if not held_out or state["saved"] is None or validation["loss"] < state["saved"]["loss"]:
                state |= {"saved_step": update.number, "saved": validation}
                save_best(run, model, tokenizer, record | {"validation": validation})
        if ends_epoch:
            state |= NEW_EPOCH
        training.save_if_due()

    # 5 save (the best model is there already)
    with run.saving(training, model, "reward model", until=state["saved_step"]) as folder:
        if folder and args.save_merged:
            _, head = lora.load_adapter(model, args.output_dir, "best", with_head=True)
            model.score.weight.data.copy_(head)
            lora.merge_adapter(model, "best")
            merged = sharding.whole_state(model, run.dtype, run.world)
            of_best = record | {"validation": state["saved"]}
            save_model(folder / "merged", model, tokenizer, of_best, merged, run.reader)


if __name__ == "__main__":
    endings.run(main, ARGS)
