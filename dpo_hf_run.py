"""Direct Preference Optimization (DPO): make a model prefer the chosen response of each pair over the rejected one.

    loss = -logsigmoid(beta * [log pi/ref(chosen | prompt) - log pi/ref(rejected | prompt)])    arXiv:2305.18290 Eq. 7

pi is the policy, ref the frozen model it starts from.  With LoRA (the default) both are one model: the reference is the
base with the adapter switched off.  Log-probs are sums over response tokens; chosen and rejected share one pass over
their prompt.  The first loss is ln 2 = 0.6931; a loss that stays there means too small a learning rate.

Deviations from the paper: AdamW instead of RMSprop; label smoothing, robust, hinge and IPO losses as options.

    python dpo_hf_run.py --model toy --dataset toy --beta 1 --learning-rate 1e-3               # laptop, offline
    python dpo_hf_run.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl --learning-rate 1e-4    # one GPU
    torchrun --nproc_per_node=4 dpo_hf_run.py --dataset pairs.jsonl --learning-rate 1e-4       # four GPUs

Copy with: formats/ harness/ distributed.py lora.py lora_targets.py losses.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py toy_world.py
"""

import gc
import itertools
import sys
from functools import partial

from harness import flags, training_flags


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    positive, rate = flags.number(float, above=0), flags.number(float, least=0)
    below_half = flags.number(float, least=0, below=0.5)
    add = parser.group("model")
    names = "--model", "--base-model-path", "--policy-model-path"
    add(*names, default="Qwen/Qwen3-0.6B", help="folder, hub id or `toy`, data too")
    add("--ref-model-path", "--reference-model-path", metavar="MODEL", help="the reference, where it is another model")
    add("--adapter", metavar="DIR", help="start from this LoRA adapter (PEFT files); the reference has it too, frozen")
    add = parser.group("data")
    add("--dataset", default="lvwerra/stack-exchange-paired", help="pairs: file, folder, hub id or `toy`")
    add("--eval-dataset", metavar="DATASET", help="evaluate on these pairs instead of holding some out")
    add = parser.group("method")
    add("--beta", "--β-ori", type=positive, default=0.1, help="strength of the pull to the reference")
    add("--loss", choices=("sigmoid", "robust", "hinge", "ipo"), default="sigmoid", help="losses.py has the equations")
    add("--label-smoothing", type=below_half, default=0.0, metavar="E", help="share of wrong labels: sigmoid, robust")
    add("--nll-coeff", type=rate, default=0.0, metavar="C", help="weight of chosen's NLL in the loss")
    training_flags.add_common_flags(parser, output_dir="outputs/dpo_qwen_trl")
    parser.set_defaults(num_samples=1000)
    args = training_flags.parse(parser, argv)
    training_flags.take_toy(args, "dataset")
    if args.label_smoothing and args.loss not in ("sigmoid", "robust"):
        parser.error(f"--label-smoothing has no effect on --loss {args.loss}: use sigmoid or robust")
    lora_flags = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"} & args.typed
    if args.adapter and lora_flags:
        parser.error(f"--{min(lora_flags).replace('_', '-')} has no effect with --adapter, which brings its own")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch
from tqdm import tqdm

import distributed
import lora
import toy_world
from formats import model_files
from formats.model_files import ModelError, enable_checkpointing, load_model, load_skeleton, load_tokenizer, save_whole
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
from losses import PAIR_METRICS, displacement, dpo_loss, nll_loss, pair_metrics
from packed_model import prepare_model
from packing import epoch_plan, hold_out, largest_pass, pack, passes_of_rank, rows_of_run, send
from preference_data import DataError, fingerprint, load_pairs

TOY_FOLDER = "outputs/toy_world"


METRICS = ["loss", *PAIR_METRICS, "nll_loss"]  # in the order of pair_losses


def pair_losses(policy, batch, ref_logps, args):
    """DPO losses of a packed batch (B,), and the METRICS of each pair (len(METRICS), B), without gradient.

    ref_logps (B, 2): what the reference gives to chosen and rejected.
    """
    policy_chosen_logps, policy_rejected_logps = policy.packed_logps(batch)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, *ref_logps.unbind(1)
    lengths = batch.response_lengths.chunk(2)  # of chosen, of rejected
    losses = dpo_loss(*policy_and_ref, args.beta, args.loss, args.label_smoothing, *lengths)[0]
    nll_losses = nll_loss(policy_chosen_logps, lengths[0])
    if args.nll_coeff:
        losses = losses + args.nll_coeff * nll_losses
    metrics = losses, *pair_metrics(*policy_and_ref, args.beta), nll_losses
    return losses, torch.stack([values.detach().to(losses.dtype) for values in metrics])


def evaluate(policy, pairs, ref_logps, held_out, share, args, world):
    """Means over held-out pairs of all ranks {eval_name: mean} and half their 95 % intervals {eval_name_ci95: ...}."""

    def measure(indices):
        batch, ref = pack([pairs[i] for i in indices], world.device), send(ref_logps[indices], world.device)
        return pair_losses(policy, batch, ref, args)[1]

    sums = distributed.sums_over_ranks(share(held_out), len(METRICS), measure, world)
    means, squares = (sums / len(held_out)).tolist()
    half = [1.96 * (max(square - mean**2, 0) / len(held_out)) ** 0.5 for mean, square in zip(means, squares)]
    result = {f"eval_{name}": mean for name, mean in zip(METRICS, means)}
    return result | {f"eval_{name}_ci95": width for name, width in zip(METRICS, half)}


def add_adapters(policy, args):
    """Give the policy its LoRA adapter (with --adapter also the frozen copy that is the reference); what to train."""
    if not args.lora_r:
        return list(policy.parameters())
    if args.adapter:
        lora.load_adapter(policy, args.adapter, "ref")
        return lora.load_adapter(policy, args.adapter, "policy", trainable=True)
    return lora.add_adapter(policy, "policy", args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)


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
    if "toy" in (args.model, args.dataset, args.eval_dataset):
        toy = distributed.main_first(world, lambda: toy_world.build(TOY_FOLDER))
        args.model = str(toy / "model") if args.model == "toy" else args.model
        if args.dataset == "toy":
            args.dataset, args.eval_dataset = str(toy / "train/helpful_pairs.jsonl"), args.eval_dataset or "toy"
        args.eval_dataset = str(toy / "test/helpful_pairs.jsonl") if args.eval_dataset == "toy" else args.eval_dataset

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args)
    add_adapters(skeleton, args)  # a wrong adapter or target shows here
    other = load_skeleton(args.ref_model_path, tokenizer, args) if args.ref_model_path else None
    estimate = memory_estimate.Estimate(skeleton, world.size, other)
    if args.estimate_memory:
        say(memory_report.report(estimate, args))
        return distributed.stop()
    read = partial(
        load_pairs,
        tokenizer=tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        skip_invalid=args.skip_invalid,
        chat_template_strings=args.chat_template_strings,
    )
    watch.phase("tokenise")
    pairs, report = read(args.dataset, limit=args.num_samples, by_default="num_samples" not in args.given)
    train, held_out = list(range(len(pairs))), []  # places in pairs
    if args.eval_dataset and args.eval_samples != 0:
        eval_pairs, eval_report = read(args.eval_dataset, limit=args.eval_samples or 0)
        held_out = list(range(len(pairs), len(pairs) + len(eval_pairs)))
        pairs, report = pairs + eval_pairs, report + eval_report
    elif args.eval_samples != 0:
        wanted = min(100, len(pairs) // 10) if args.eval_samples is None else args.eval_samples
        train, held_out = hold_out(pairs, wanted, args.seed)
        if len(held_out) < (args.eval_samples or 0):
            raise DataError(f"--eval-samples {args.eval_samples} leaves nothing to train on: make it smaller")
        report.append(f"  held out {len(held_out):,} pairs by whole prompts, {len(train):,} to train on")
    say(*report, sep="\n")
    lengths = [sum(map(len, pair[:3])) for pair in pairs]
    within = {"ranks": world.size, "batch_size": args.batch_size, "lengths": lengths}
    within["budget"] = args.tokens_per_microbatch
    if 0 < args.tokens_per_microbatch < max(lengths):
        say(f"Pairs of more than {args.tokens_per_microbatch} tokens take a pass each; the longest has {max(lengths)}")
    share = partial(passes_of_rank, rank=world.rank, **within)
    accumulation = args.gradient_accumulation_steps
    plan_epoch = partial(epoch_plan, train, seed=args.seed, accumulation=accumulation, **within)
    updates_per_epoch = len(plan_epoch(epoch=0))
    num_updates = min(args.epochs * updates_per_epoch, args.max_steps or sys.maxsize)
    needed = rows_of_run(plan_epoch, num_updates, held_out)  # of these a frozen model is asked
    if world.size > 1:
        facts = {"data": fingerprint(pairs), "checkpoint": checkpoint and checkpoint.name}
        distributed.check_same_on_all_ranks(run_files.flags_of_a_run(args) | facts, world)

    # 3 models
    watch.phase("load")
    dtype = device.pick_dtype(args.dtype, world, checkpoints.begun_in(checkpoint))
    weights_dtype = dtype if args.lora_r else torch.float32  # weights that are trained are fp32, computed with in dtype
    load = partial(load_model, device="cpu" if sharded else world.device, trust_remote_code=args.trust_remote_code)
    policy = reference = load(args.model, weights_dtype)
    distributed.seed_everything(args.seed)
    parameters = add_adapters(policy, args)
    say(f"{prepare_model(policy)} ({world.device}, {str(dtype).removeprefix('torch.')})")
    checkpointing = estimate.checkpointing(args, device.room(world), largest_pass(**within), policy.packs_pairs)
    if checkpointing:
        enable_checkpointing(policy)
        say("gradient checkpointing: on")
    if args.ref_model_path:  # else the policy is its own reference, before its first update
        reference = load(args.ref_model_path, weights_dtype)
        prepare_model(reference)
    data, start = fingerprint([pairs[i] for i in train]), lora.adapter_state(policy, "ref" if args.adapter else None)
    identity = run_files.identity(__file__, args, world, dtype, data, policy, start)
    if world.is_main:
        identity["reference"] = identity["base model"]
        if reference is not policy:
            identity["reference"] = score_cache.frozen_sha256(reference)
        if checkpoint:
            checkpoints.check_identity(checkpoint, identity)
    if sharded:
        parameters = sharding.shard(policy, reference, world, dtype, say, args.optimizer_offload)
    autocast = torch.autocast(world.device.type, dtype, enabled=weights_dtype != dtype)
    watch.phase("cache")
    termination = checkpoints.Termination()
    with lora.use_adapter(policy, "ref" if args.adapter else None), autocast:
        ref_logps = score_cache.frozen_scores(
            args.cache_dir or f"{args.output_dir}/cache",
            "reference",
            identity.get("reference"),
            fingerprint(pairs),
            f"{dtype}{' sharded' * sharded}",
            lambda indices: reference.packed_logps(pack([pairs[i] for i in indices], world.device)),
            len(pairs),
            needed,
            share,
            world,
            termination,
            say,
        )
    watch.phase("other")
    reference = None  # frozen: it has said all it has to say
    gc.collect()  # a sharded model has methods that hold it
    say(*memory_report.start_lines("policy model", parameters, policy, args, world), sep="\n")

    # 4 optimiser
    optimizer = optimizers.make_optimizer(parameters, args)
    scheduler = optimizers.make_scheduler(optimizer, args, num_updates, say)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    distributed.assert_same_on_all_ranks(parameters, world)
    distributed.seed_everything(args.seed + world.rank)  # from here on chance (dropout) differs between ranks

    # 5 train
    window = torch.zeros(len(METRICS), device=world.device)  # sums of METRICS since the last log line
    pair_flops = speed.useful_flops(policy, pairs)
    grad_norms = []  # since the last log line, on the device: to look at each at once would wait for it
    at = {"step": 0, "tokens": 0, "pairs": 0, "warned": False, "history": None}  # pairs: since the last log line
    if checkpoint:
        tensors, at = checkpoints.restore(checkpoint, parameters, optimizer, scheduler, scaler, world)
        window += checkpoints.own_sums(tensors["window"], world)
        say(f"resumed from {checkpoint}")
    log = run_files.MetricsLog(args, world.is_main, checkpoint, at["history"])
    bar = tqdm(total=num_updates, initial=at["step"], desc="updates", disable=not distributed.shows_bars(world))

    def evaluate_and_log():
        policy.eval()
        with autocast:
            metrics = evaluate(policy, pairs, ref_logps, held_out, share, args, world)
        policy.train()
        flags.check_held_out(metrics["eval_loss"], at["step"])
        log.write(at["step"], at["step"] / updates_per_epoch, metrics)
        shown = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "logps/chosen")
        numbers = (f"{name}={metrics['eval_' + name]:.4f}±{metrics[f'eval_{name}_ci95']:.4f}" for name in shown)
        say(f"Held out, step {at['step']}: {' '.join(numbers)}")

    def save_checkpoint():
        flags.check_weights(parameters, at["step"])
        tensors = {"chance": distributed.gather(checkpoints.chance(world.device), world)}
        tensors["window"] = distributed.gather(window, world)
        at.update(identity=identity, history=log.history)
        add_adapter = partial(lora.save_adapter, policy, "policy", base_model=args.model) if args.lora_r else None
        checkpoints.save(args, world, parameters, optimizer, scheduler, scaler, tensors, at, say, add_adapter)

    if held_out and not checkpoint:
        evaluate_and_log()
    policy.train()
    updates = itertools.chain.from_iterable(plan_epoch(epoch=epoch) for epoch in itertools.count())
    for num_pairs, micro_batches in itertools.islice(updates, at["step"], num_updates):
        for indices in micro_batches[world.rank]:
            watch.phase("forward")
            batch, ref = pack([pairs[i] for i in indices], world.device), send(ref_logps[indices], world.device)
            with autocast:
                losses, metrics = pair_losses(policy, batch, ref, args)
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
        if step % args.logging_steps == 0 or step == num_updates:
            sums, norms = distributed.all_reduce_sum(window, world).tolist(), torch.stack(grad_norms).tolist()
            flags.check_norms(norms, step, scaler)
            metrics = {name: total / at["pairs"] for name, total in zip(METRICS, sums, strict=True)}
            metrics |= {"grad_norm": norms[-1], "learning_rate": scheduler.get_last_lr()[0]}
            metrics |= {"beta": args.beta, "num_tokens": at["tokens"]}
            log.write(step, step / updates_per_epoch, metrics)
            shown = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/chosen_change", "grad_norm")
            numbers = " ".join(f"{name}={metrics[name]:.4f}" for name in shown)
            line = f"Epoch {epoch} step {step} loss={metrics['loss']:.4f} beta={args.beta:g} {numbers}"
            say(f"{line} learning_rate={metrics['learning_rate']:.2e} {watch.rate()}")
            if displacement(metrics) and not at["warned"]:
                at["warned"] = True
                say(displacement(metrics))
            window.zero_()
            grad_norms.clear()
            at["pairs"] = 0
        if held_out and (step == num_updates or (args.eval_steps and step % args.eval_steps == 0)):
            evaluate_and_log()
        asked_to_end = distributed.on_any_rank(termination.asked, world)
        if asked_to_end or (args.save_steps and step % args.save_steps == 0):
            save_checkpoint()
        if asked_to_end:
            termination.end_training(asked_to_end, args, step, say)
    bar.close()
    say("Seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in watch.read().items()))
    say(*memory_report.memory_lines(world), sep="\n")

    # 6 save
    flags.check_weights(parameters, at["step"])
    distributed.assert_same_on_all_ranks(parameters, world)
    log.close()
    state = None if args.lora_r else sharding.whole_state(policy, dtype, world)
    if world.is_main:
        with run_files.whole_files(args.output_dir) as folder:
            if args.lora_r:
                lora.save_adapter(policy, "policy", folder, args.model)
            else:
                save_whole(policy, folder, state)
            model_files.save_tokenizer(tokenizer, folder)
            card = run_files.model_card(args, __file__, "DPO", log.history, identity["data"], lora.left_out(policy))
            run_files.save_run_record(folder, log, args, __file__, card)
            if args.save_merged:
                lora.merge_adapter(policy, "policy")
                policy.save_pretrained(folder / "merged")
                model_files.save_tokenizer(tokenizer, folder / "merged")
        say(f"saved to {args.output_dir}")
    distributed.stop()


USER_ERRORS = (DataError, ModelError, lora.AdapterError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += checkpoints.CheckpointError, memory_estimate.EstimateError, optimizers.OptimizerError

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
