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
    packed_probe.py packing.py preference_data.py reward_models.py toy_world.py
"""

import itertools
import json
import sys
from functools import partial

from harness import flags, training_flags


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    positive = flags.number(float, least=0)
    add = parser.group("model")
    add("--task", choices=("helpful", "harmless"), help="which of the two reward models: has to be given")
    add("--model", "--base-model-path", default="Qwen/Qwen3-0.6B", help="base: folder, hub id or `toy`, data too")
    add("--tokenizer-name", metavar="DIR", help="tokenizer, where it is not the model's")
    add = parser.group("data")
    for part in ("train", "val"):
        for task in ("helpful", "harmless"):
            path = f"data/{part}/{task}_pairs.jsonl"
            add(f"--{part}-{task}-path", default=path, metavar="FILE", help=f"pairs of --task {task}, or `toy`")
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
from tqdm import tqdm

import distributed
import lora
import reward_models
import toy_world
from formats.model_files import (
    ModelError,
    enable_checkpointing,
    load_model,
    load_skeleton,
    load_tokenizer,
    pad_unlike_ends,
    save_whole,
)
from harness import (
    checkpoints,
    device,
    memory_estimate,
    memory_report,
    optimizers,
    run_files,
    score_cache,
    sharding,
    speed,
)
from losses import harm_label_loss, reward_loss
from packed_model import prepare_scores
from packing import epoch_plan, largest_pass, pack, passes_of_rank, send
from preference_data import DataError, fingerprint, load_pairs

TOY_FOLDER = "outputs/toy_world"


METRICS = "loss ranking_loss accuracy margin chosen_score rejected_score".split()  # in the order of pair_losses


def pair_losses(model, batch, labels, args):
    """Losses of a packed batch (B,), and METRICS of each pair (len(METRICS), B), without gradient; labels (B, 2)."""
    chosen_scores, rejected_scores = model.packed_scores(batch)
    losses = ranking = reward_loss(chosen_scores, rejected_scores, args.center_rewards)
    if args.classification_loss_weight:
        losses = ranking + args.classification_loss_weight * harm_label_loss(chosen_scores, rejected_scores, labels)
    margin = chosen_scores - rejected_scores
    metrics = losses, ranking, margin > 0, margin, chosen_scores, rejected_scores
    return losses, torch.stack([values.detach().to(losses.dtype) for values in metrics])


@torch.no_grad()
def evaluate(model, pairs, labels, held_out, share, args, world):
    """The held-out losses and reward_models.score_statistics, {name: number}; every rank scores its share."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64)
    scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for indices in share(held_out):
        batch, labelled = pack([pairs[i] for i in indices], world.device), send(labels[indices], world.device)
        metrics = pair_losses(model, batch, labelled, args)[1].cpu().double()
        sums += metrics.sum(1)
        scores[indices] = metrics[-2:].t()  # chosen_score, rejected_score
    sums, scores = distributed.all_reduce_sum(sums, world), distributed.all_reduce_sum(scores, world)[held_out]
    result = dict(zip(METRICS[:2], (sums[:2] / len(held_out)).tolist(), strict=True))
    result |= reward_models.score_statistics(scores, labels[held_out])
    result["accuracy_ci95"] = 1.96 * (result["accuracy"] * (1 - result["accuracy"]) / len(held_out)) ** 0.5
    return result


def save_model(folder, model, tokenizer, record, state=None):
    """The adapter with its head in PEFT's format or, of a `state`, transformers' whole model; and reward_model.json."""
    if state:
        model.config.pad_token_id = record["pad_token_id"]
        save_whole(model, folder, state)
    else:
        lora.save_adapter(model, "reward", folder, record["base_model"], model.score.weight)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(record["pad_token_id"])
    tokenizer.save_pretrained(folder)
    record = record | {"sha256": reward_models.files_sha256(folder)}
    (folder / "reward_model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(args):
    # 1 setup
    world = distributed.start(args.device, args.ddp_timeout)
    sharded = world.size > 1 and not args.lora_r  # weights, gradients and optimiser, over the ranks
    optimizers.check(args, world.device.type, sharded)
    watch = speed.Stopwatch(world.device, "start")
    say = partial(distributed.print0, world)
    checkpoint = checkpoints.find(args.output_dir, args.resume, say)
    run_files.check_output(args, checkpoint)
    if world.size > 1:
        say(f"Distributed training initialized: world_size={world.size}")
    train_path, val_path = (getattr(args, f"{part}_{args.task}_path") for part in ("train", "val"))
    if "toy" in (args.model, train_path, val_path):
        toy = distributed.main_first(world, lambda: toy_world.build(TOY_FOLDER))
        args.model = str(toy / "model") if args.model == "toy" else args.model
        train_path = str(toy / f"train/{args.task}_pairs.jsonl") if train_path == "toy" else train_path
        val_path = str(toy / f"val/{args.task}_pairs.jsonl") if val_path == "toy" else val_path

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = load_tokenizer(args.tokenizer_name or args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args, scores=True)
    if args.lora_r:  # a wrong target shows here
        lora.add_adapter(skeleton, "reward", args.lora_r, args.lora_alpha, 0.0, args.lora_target_modules)
    estimate = memory_estimate.Estimate(skeleton, world.size)
    if args.estimate_memory:
        say(memory_report.report(estimate, args))
        return distributed.stop()
    watch.phase("tokenise")
    names = "max_length max_prompt_length skip_invalid chat_template_strings".split()
    read = partial(load_pairs, tokenizer=tokenizer, **{name: getattr(args, name) for name in names})
    pairs, report = read(train_path, limit=args.num_samples)
    train, held_out = list(range(len(pairs))), []  # places in pairs
    if args.eval_samples != 0:
        try:
            val_pairs, val_report = read(val_path, limit=args.eval_samples or 0)
        except DataError as error:
            raise DataError(f"{error} (without validation: --eval-samples 0)") from None
        held_out = list(range(len(pairs), len(pairs) + len(val_pairs)))
        pairs, report = pairs + val_pairs, report + val_report
    say(*report, sep="\n")
    harm = [args.task == "harmless" and pair.labels or (0, 0) for pair in pairs]
    labels = torch.tensor(harm, dtype=torch.float32)
    labelled = int(labels[train].abs().amax(1).sum())
    calibrated = bool(args.classification_loss_weight) and {1, -1} <= set(labels[train].flatten().tolist())
    if args.classification_loss_weight:
        say(f"{labelled:,} of {len(train):,} pairs to train on have labels of harm")
        if not calibrated:
            say("Without labels of both kinds the score's zero means nothing (calibrated: false)")
    lengths = [sum(map(len, pair[:3])) for pair in pairs]
    within = {"ranks": world.size, "batch_size": args.batch_size, "lengths": lengths}
    within["budget"] = args.tokens_per_microbatch
    if 0 < args.tokens_per_microbatch < max(lengths):
        say(f"Pairs of more than {args.tokens_per_microbatch} tokens take a pass each; the longest has {max(lengths)}")
    share = partial(passes_of_rank, rank=world.rank, **within)
    if world.size > 1:
        facts = {"data": fingerprint(pairs), "checkpoint": checkpoint and checkpoint.name}
        distributed.check_same_on_all_ranks(run_files.flags_of_a_run(args) | facts, world)

    # 3 models
    watch.phase("load")
    dtype = device.pick_dtype(args.dtype, world, checkpoints.begun_in(checkpoint))
    weights_dtype = dtype if args.lora_r else torch.float32  # weights that are trained are fp32, computed with in dtype
    place = "cpu" if sharded else world.device
    model = load_model(args.model, weights_dtype, place, args.trust_remote_code, scores=True)
    distributed.seed_everything(args.seed)
    parameters = list(model.parameters())
    if args.lora_r:
        adapter = args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules
        parameters = [*lora.add_adapter(model, "reward", *adapter), model.score.weight.requires_grad_(True)]
    say(f"{prepare_scores(model)} ({world.device}, {str(dtype).removeprefix('torch.')})")
    checkpointing = estimate.checkpointing(args, device.room(world), largest_pass(**within), model.packs_pairs)
    if checkpointing:
        enable_checkpointing(model)
        say("gradient checkpointing: on")
    identity = run_files.identity(__file__, args, world, dtype, fingerprint([pairs[i] for i in train]), model)
    identity["validation data"] = fingerprint([pairs[i] for i in held_out])  # it decides which epoch is the best
    record = None
    if world.is_main:
        if checkpoint:
            checkpoints.check_identity(checkpoint, identity)
        record = {
            "task": args.task,
            "sign": "a higher score is better" if args.task == "helpful" else "a higher score is safer; cost = -score",
            "calibrated": calibrated,
            "base_model": args.model,
            "base_sha256": score_cache.base_sha256(model),
            "data_sha256": identity["data"],
            "pad_token_id": pad_unlike_ends(args.model, tokenizer, model.config),
        }
    if sharded:
        parameters = sharding.shard(model, model, world, dtype, say, args.optimizer_offload)
    say(*memory_report.start_lines("", parameters, model, args, world), sep="\n")

    # 4 optimiser
    accumulation = args.gradient_accumulation_steps
    plan_epoch = partial(epoch_plan, train, seed=args.seed, accumulation=accumulation, **within)
    updates_per_epoch = len(plan_epoch(epoch=0))
    num_updates = min(args.epochs * updates_per_epoch, args.max_steps or sys.maxsize)
    optimizer = optimizers.make_optimizer(parameters, args)
    scheduler = optimizers.make_scheduler(optimizer, args, num_updates, say)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(world.device.type, dtype, enabled=weights_dtype != dtype)
    distributed.assert_same_on_all_ranks(parameters, world)
    distributed.seed_everything(args.seed + world.rank)  # from here on chance (dropout) differs between ranks

    # 5 train
    window = torch.zeros(len(METRICS), device=world.device)  # sums of METRICS since the last log line
    pair_flops = speed.useful_flops(model, pairs)
    grad_norms = []  # since the last log line, on the device: to look at each at once would wait for it
    # pairs: since the last log line; epoch: losses and pairs since it began; kept: the step of the best, which is saved
    at = {"step": 0, "tokens": 0, "pairs": 0, "epoch": [0, 0], "kept": 0, "best": None, "history": None}
    if checkpoint:
        tensors, at = checkpoints.restore(checkpoint, parameters, optimizer, scheduler, scaler, world)
        window += checkpoints.own_sums(tensors["window"], world)
        say(f"resumed from {checkpoint}")
        if at["kept"] and not run_files.goes_on(args, checkpoint):
            say(f"The best model so far is in {checkpoint.parent}: {args.output_dir} gets the best from here on")
            at.update(best=None)
    log = run_files.MetricsLog(args, world.is_main, checkpoint, at["history"])
    termination = checkpoints.Termination()
    bar = tqdm(total=num_updates, initial=at["step"], desc="updates", disable=not distributed.shows_bars(world))

    def evaluate_and_keep_the_best():
        """After each epoch, and after the last update."""
        metrics = {}
        if held_out:
            model.eval()
            with autocast:
                metrics = evaluate(model, pairs, labels, held_out, share, args, world)
            model.train()
            flags.check_held_out(metrics["loss"], at["step"])
            written = {f"eval_{name}": value for name, value in metrics.items()}
            log.write(at["step"], at["step"] / updates_per_epoch, written)
            line = f"[{args.task}] Epoch {-(-at['step'] // updates_per_epoch)}/{args.epochs}"
            line += f" train_loss={at['epoch'][0] / at['epoch'][1]:.4f}" if at["step"] else ""
            say(f"{line} val_loss={metrics['loss']:.4f} val_acc={metrics['accuracy']:.4f}")
            words = "margin score score_std safe_sign_accuracy harmful_sign_accuracy auroc brier".split()
            say("  " + " ".join(f"{name}={metrics[name]:.4f}" for name in words if name in metrics))
        flags.check_weights(parameters, at["step"])
        if at["step"] and (not held_out or at["best"] is None or metrics["loss"] < at["best"]["loss"]):
            at.update(best=metrics, kept=at["step"])
            state = None if args.lora_r else sharding.whole_state(model, dtype, world)
            if world.is_main:
                loss = f"val_loss={metrics['loss']:.4f}" if held_out else "no validation: the last one"
                say(f"Saving best model to {args.output_dir} ({loss})")
                with run_files.whole_files(args.output_dir) as folder:
                    save_model(folder, model, tokenizer, record | {"validation": metrics}, state)

    def save_checkpoint():
        flags.check_weights(parameters, at["step"])
        tensors = {"chance": distributed.gather(checkpoints.chance(world.device), world)}
        tensors["window"] = distributed.gather(window, world)
        at.update(identity=identity, history=log.history)
        checkpoints.save(args, world, parameters, optimizer, scheduler, scaler, tensors, at, say)

    if not checkpoint:
        evaluate_and_keep_the_best()
    model.train()
    updates = itertools.chain.from_iterable(plan_epoch(epoch=epoch) for epoch in itertools.count())
    for num_pairs, micro_batches in itertools.islice(updates, at["step"], num_updates):
        for indices in micro_batches[world.rank]:
            watch.phase("forward")
            batch, labelled = pack([pairs[i] for i in indices], world.device), send(labels[indices], world.device)
            with autocast:
                losses, metrics = pair_losses(model, batch, labelled, args)
            watch.phase("backward")
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            scaler.scale(losses.sum() / num_pairs).backward()
            window += metrics.sum(1)
        watch.phase("communicate")
        distributed.all_reduce_gradients(parameters, world)
        watch.phase("step")
        grad_norms.append(distributed.take_step(parameters, optimizer, scheduler, scaler, args.max_grad_norm))
        watch.phase("other")
        in_update = [i for share in micro_batches for indices in share for i in indices]
        at["step"] += 1
        at["pairs"] += num_pairs
        at["tokens"] += sum(lengths[i] for i in in_update)
        watch.work(num_pairs, sum(pair_flops[i] for i in in_update))
        bar.update()
        if at["step"] == 1 and world.device.type == "cuda":
            say(memory_report.first_update(estimate, args, checkpointing, micro_batches, lengths))

        step, epoch = at["step"], (at["step"] - 1) // updates_per_epoch + 1
        ends_epoch = step % updates_per_epoch == 0 or step == num_updates
        evaluates = ends_epoch or (held_out and args.eval_steps and step % args.eval_steps == 0)
        if step % args.logging_steps == 0 or evaluates:
            sums, norms = distributed.all_reduce_sum(window, world).tolist(), torch.stack(grad_norms).tolist()
            flags.check_norms(norms, step, scaler)
            metrics = {name: total / at["pairs"] for name, total in zip(METRICS, sums, strict=True)}
            metrics |= {"grad_norm": norms[-1], "learning_rate": scheduler.get_last_lr()[0]}
            metrics |= {"num_tokens": at["tokens"]}
            log.write(step, step / updates_per_epoch, metrics)
            at["epoch"] = [at["epoch"][0] + sums[0], at["epoch"][1] + at["pairs"]]
            numbers = " ".join(f"{name}={metrics[name]:.4f}" for name in ("loss", "accuracy", "margin", "grad_norm"))
            line = f"[{args.task}] Epoch {epoch} step {step} {numbers}"
            say(f"{line} learning_rate={metrics['learning_rate']:.2e} {watch.rate()}")
            window.zero_()
            grad_norms.clear()
            at["pairs"] = 0
        if evaluates:
            evaluate_and_keep_the_best()
        at["epoch"] = [0, 0] if ends_epoch else at["epoch"]
        asked_to_end = distributed.on_any_rank(termination.asked, world)
        if asked_to_end or (args.save_steps and step % args.save_steps == 0):
            save_checkpoint()
        if asked_to_end:
            termination.end_training(asked_to_end, args, step, say)
    bar.close()
    say("Seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in watch.read().items()))
    say(*memory_report.memory_lines(world), sep="\n")

    # 6 save (the best model is there already)
    distributed.assert_same_on_all_ranks(parameters, world)
    log.close()
    if world.is_main:
        with run_files.whole_files(args.output_dir) as folder:
            data = fingerprint([pairs[i] for i in train])
            until = [entry for entry in log.history if entry["step"] <= at["kept"]]  # the card is of what is saved
            card = run_files.model_card(args, __file__, "reward model", until, data, lora.left_out(model))
            run_files.save_run_record(folder, log, args, __file__, card)
            if args.save_merged:
                _, head = lora.load_adapter(model, args.output_dir, "best", with_head=True)
                model.score.weight.data.copy_(head)
                lora.merge_adapter(model, "best")
                state = sharding.whole_state(model, dtype, world)
                save_model(folder / "merged", model, tokenizer, record | {"validation": at["best"]}, state)
        say(f"saved to {args.output_dir}")
    distributed.stop()


USER_ERRORS = (DataError, ModelError, lora.AdapterError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += checkpoints.CheckpointError, memory_estimate.EstimateError, optimizers.OptimizerError

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
