"""Learn a soft prompt: n vectors that stand in every prompt and make a frozen model prefer the chosen responses.

    loss = -logsigmoid(beta [log p(chosen | x, v) - log p(chosen | x) - log p(rejected | x, v) + log p(rejected | x)])

p is the frozen model, v the vectors (prompt tuning, arXiv:2104.08691), the only thing that is trained.  The loss is
DPO's (arXiv:2305.18290 Eq. 7) with the prompted model as policy and the plain one as reference.  They start from the
embeddings of a text, of random tokens, or at random; train_with_preference_prompt.py moves their effect into weights.

Deviations from prompt tuning's paper: preference pairs instead of targets; AdamW instead of Adafactor.

    python learn_prompt.py --model toy --preference-text "Please answer politely and briefly." --beta 1    # laptop
    python learn_prompt.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset-path pairs.jsonl --prompt-init vocab  # one GPU
    torchrun --nproc_per_node=4 learn_prompt.py --dataset-path pairs.jsonl --prompt-init vocab             # four GPUs

Copy with: formats/ harness/ distributed.py lora.py lora_targets.py losses.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py preference_prompt.py toy_world.py
"""

import itertools
import sys
from functools import partial

from harness import flags, training_flags


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    vectors = flags.number(int, least=1, most=10**5)
    add = parser.group("model")
    names = "--model", "--base-model-path", "--policy-model-path"
    add(*names, default="Qwen/Qwen2.5-1.5B-Instruct", help="folder, hub id or `toy`, data too")
    add = parser.group("data")
    pairs = "data/train/helpful_pairs.jsonl"
    add("--dataset-path", "--dataset", default=pairs, metavar="DATASET", help="pairs: file, folder, hub id or `toy`")
    names = "--test-dataset-path", "--eval-dataset"
    add(*names, metavar="DATASET", help="evaluate on these pairs instead of holding some out")
    add = parser.group("method")
    add("--num-virtual-tokens", type=vectors, metavar="N", help="vectors (default: 20; of a text, its tokens)")
    inits = "text", "vocab", "random"
    add("--prompt-init", choices=inits, default="text", help="start from --preference-text, random tokens, or noise")
    add("--preference-text", metavar="TEXT", help="what --prompt-init text starts from, repeated or cut to N tokens")
    add(
        "--preference-position",
        choices=("prefix", "before-response"),
        default="prefix",
        help="where in a prompt the vectors stand",
    )
    add("--beta", "--β-ori", type=flags.number(float, above=0), default=0.1, help="what the loss multiplies margins by")
    documented = dict(batch_size=4, gradient_accumulation_steps=4, learning_rate=1e-2)
    training_flags.add_common_flags(parser, **documented, output_dir="outputs/soft_prompt", adapter=False)
    args = training_flags.parse(parser, argv)
    if (args.prompt_init == "text") != bool(args.preference_text):
        parser.error('--prompt-init text and --preference-text "..." go together: give the text, or vocab or random')
    training_flags.take_toy(args, "dataset_path", "test_dataset_path")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch
from tqdm import tqdm

import distributed
import toy_world
from formats.model_files import (
    ModelError,
    check_positions,
    enable_checkpointing,
    load_model,
    load_skeleton,
    load_tokenizer,
)
from harness import checkpoints, device, memory_estimate, memory_report, optimizers, run_files, score_cache, speed
from losses import PAIR_METRICS, dpo_loss, pair_metrics
from packed_model import prepare_model
from packing import epoch_plan, hold_out, largest_pass, pack, passes_of_rank, rows_of_run, send
from preference_data import DataError, Pair, fingerprint, load_pairs
from preference_prompt import PromptError, save_soft_prompt, use_soft_prompt, with_virtual_tokens

TOY_FOLDER = "outputs/toy_world"
TOY = {"model": "model", "dataset_path": "train/polite_pairs.jsonl", "test_dataset_path": "test/polite_pairs.jsonl"}


METRICS = ["loss", *PAIR_METRICS]  # in the order of pair_losses


def pair_losses(model, batch, ref_logps, args):
    """Losses of a packed batch with the vectors in it (B,), and the METRICS of each pair (len(METRICS), B), without
    gradient.  ref_logps (B, 2): what the model gives to chosen and rejected without them.
    """
    prompted_and_plain = *model.packed_logps(batch), *ref_logps.unbind(1)
    losses = dpo_loss(*prompted_and_plain, args.beta)[0]
    metrics = losses, *pair_metrics(*prompted_and_plain, args.beta)
    return losses, torch.stack([values.detach().to(losses.dtype) for values in metrics])


def first_vectors(model, tokenizer, args):
    """The vectors (N, D) fp32 that training starts from, as the embedding layer returns them (Gemma's are scaled)."""
    embedding, num = model.get_input_embeddings(), args.num_virtual_tokens
    generator = torch.Generator().manual_seed(args.seed)
    if args.prompt_init == "text":
        ids = tokenizer(args.preference_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError(f"--preference-text {args.preference_text!r} has no tokens: say something")
        ids = [ids[place % len(ids)] for place in range(num or len(ids))]
    else:
        ids = torch.randint(len(tokenizer), (num or 20,), generator=generator).tolist()
    vectors = embedding(torch.tensor(ids, device=model.device)).float()
    if args.prompt_init == "random":  # noise of the size of embeddings
        vectors = torch.randn(vectors.shape, generator=generator).to(model.device) * vectors.std()
    return vectors.detach()


def evaluate(model, pairs, ref_logps, held_out, share, args, world):
    """Means over held-out pairs of all ranks {eval_name: mean} and half their 95 % intervals {eval_name_ci95: ...}."""

    def measure(indices):
        batch, ref = pack([pairs[i] for i in indices], world.device), send(ref_logps[indices], world.device)
        return pair_losses(model, batch, ref, args)[1]

    sums = distributed.sums_over_ranks(share(held_out), len(METRICS), measure, world)
    means, squares = (sums / len(held_out)).tolist()
    half = [1.96 * (max(square - mean**2, 0) / len(held_out)) ** 0.5 for mean, square in zip(means, squares)]
    result = {f"eval_{name}": mean for name, mean in zip(METRICS, means)}
    return result | {f"eval_{name}_ci95": width for name, width in zip(METRICS, half)}


def main(args):
    # 1 setup
    world = distributed.start(args.device, args.ddp_timeout)
    optimizers.check(args, world.device.type)
    watch = speed.Stopwatch(world.device, "start")
    say = partial(distributed.print0, world)
    checkpoint = checkpoints.find(args.output_dir, args.resume, say)
    run_files.check_output(args, checkpoint)
    if world.size > 1:
        say(f"Distributed training initialized: world_size={world.size}")
    if toys := [name for name in TOY if getattr(args, name) == "toy"]:
        toy = distributed.main_first(world, lambda: toy_world.build(TOY_FOLDER))
        vars(args).update((name, str(toy / TOY[name])) for name in toys)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args)
    of_text = tokenizer(args.preference_text or "", add_special_tokens=False)["input_ids"]
    vectors = args.num_virtual_tokens or (len(of_text) if args.prompt_init == "text" else 20)
    what = f"--max-length {args.max_length} with {vectors} vectors"
    check_positions(skeleton.config, args.max_length + vectors, what, args.model)
    estimate = memory_estimate.Estimate(skeleton, world.size, vectors=vectors)
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
    pairs, report = read(args.dataset_path, limit=args.num_samples)
    train, held_out = list(range(len(pairs))), []  # places in pairs
    if args.test_dataset_path and args.eval_samples != 0:
        eval_pairs, eval_report = read(args.test_dataset_path, limit=args.eval_samples or 0)
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
    model = load_model(args.model, dtype, world.device, args.trust_remote_code).requires_grad_(False)
    distributed.seed_everything(args.seed)
    say(f"{prepare_model(model)} ({world.device}, {str(dtype).removeprefix('torch.')})")
    checkpointing = estimate.checkpointing(args, device.room(world), largest_pass(**within), model.packs_pairs)
    if checkpointing:
        enable_checkpointing(model)
        say("gradient checkpointing: on")
    identity = run_files.identity(__file__, args, world, dtype, fingerprint([pairs[i] for i in train]), model)
    if checkpoint and world.is_main:
        checkpoints.check_identity(checkpoint, identity)
    watch.phase("cache")
    termination = checkpoints.Termination()
    with torch.no_grad():
        ref_logps = score_cache.frozen_scores(
            args.cache_dir or f"{args.output_dir}/cache",
            "reference",
            identity["base model"],
            fingerprint(pairs),
            dtype,
            lambda indices: model.packed_logps(pack([pairs[i] for i in indices], world.device)),
            len(pairs),
            needed,
            share,
            world,
            termination,
            say,
        )
    watch.phase("other")
    vectors = torch.nn.Parameter(first_vectors(model, tokenizer, args))  # (N, D) fp32
    parameters = [vectors]
    use_soft_prompt(model, vectors)
    insert = partial(with_virtual_tokens, num_vectors=len(vectors), position=args.preference_position)
    pairs = [Pair(insert(pair.prompt_ids), pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    say(*memory_report.start_lines("soft prompt", parameters, model, args, world), sep="\n")

    # 4 optimiser
    optimizer = optimizers.make_optimizer(parameters, args)
    scheduler = optimizers.make_scheduler(optimizer, args, num_updates, say)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    distributed.assert_same_on_all_ranks(parameters, world)
    distributed.seed_everything(args.seed + world.rank)  # from here on chance (dropout) differs between ranks

    # 5 train
    window = torch.zeros(len(METRICS), device=world.device)  # sums of METRICS since the last log line
    pair_flops = speed.useful_flops(model, pairs)
    grad_norms = []  # since the last log line, on the device: to look at each at once would wait for it
    at = {"step": 0, "tokens": 0, "pairs": 0, "history": None}  # pairs: since the last log line
    if checkpoint:
        tensors, at = checkpoints.restore(checkpoint, parameters, optimizer, scheduler, scaler, world)
        window += checkpoints.own_sums(tensors["window"], world)
        say(f"resumed from {checkpoint}")
    log = run_files.MetricsLog(args, world.is_main, checkpoint, at["history"])
    bar = tqdm(total=num_updates, initial=at["step"], desc="updates", disable=not distributed.shows_bars(world))

    def evaluate_and_log():
        model.eval()
        metrics = evaluate(model, pairs, ref_logps, held_out, share, args, world)
        model.train()
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
        checkpoints.save(args, world, parameters, optimizer, scheduler, scaler, tensors, at, say)

    if held_out and not checkpoint:
        evaluate_and_log()
    model.train()  # frozen and without dropout: for gradient checkpointing, which a model in eval mode passes over
    updates = itertools.chain.from_iterable(plan_epoch(epoch=epoch) for epoch in itertools.count())
    for num_pairs, micro_batches in itertools.islice(updates, at["step"], num_updates):
        for indices in filter(None, micro_batches[world.rank]):  # a pass without pairs has no vectors to train
            watch.phase("forward")
            batch, ref = pack([pairs[i] for i in indices], world.device), send(ref_logps[indices], world.device)
            losses, metrics = pair_losses(model, batch, ref, args)
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
    if world.is_main:
        with run_files.whole_files(args.output_dir) as folder:
            save_soft_prompt(vectors, folder, args.model, args.preference_position)
            card = run_files.model_card(args, __file__, "prompt tuning", log.history, identity["data"], left_out=[])
            run_files.save_run_record(folder, log, args, __file__, card)
        say(f"saved to {args.output_dir}")
    distributed.stop()


USER_ERRORS = (DataError, ModelError, PromptError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += checkpoints.CheckpointError, memory_estimate.EstimateError, optimizers.OptimizerError

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
