"""Preference-guided DPO: move what a preference prompt does to a model into its weights, so that it is not needed.

    loss = -logsigmoid(beta h) + alpha relu(m_p - m) + lambda_kl KL(pi || ref)
    h    = log pi/ref(chosen | x) - log pi/ref(rejected | x)                    DPO, arXiv:2305.18290 Eq. 7
    m    = log pi(chosen | x) - log pi(rejected | x)
    m_p  = log pi(chosen | x, p) - log pi(rejected | x, p)                      no gradient; p the preference

The preference p is a text put into the prompt (--preference-text), or a soft prompt, vectors that learn_prompt.py made
(--use-prompt-embedding --prompt-embedding-path).  What is trained never sees it.  --teacher policy takes m_p from the
policy as it is, --teacher ref from the frozen reference: context distillation (arXiv:2112.00861) of a margin.

Deviations from DPO's paper: the two terms behind it; AdamW instead of RMSprop.

    python train_with_preference_prompt.py --model toy --preference-text "Please answer politely and briefly." \\
        --batch-size 16 --gradient-accumulation-steps 1 --learning-rate 1e-3                    # laptop, offline
    python train_with_preference_prompt.py --dataset-path pairs.jsonl --preference-text "Answer politely."   # one GPU
    torchrun --nproc_per_node=4 train_with_preference_prompt.py --dataset-path pairs.jsonl \\
        --use-prompt-embedding --prompt-embedding-path outputs/soft_prompt                      # four GPUs

Copy with: formats/ harness/ distributed.py lora.py lora_targets.py losses.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py preference_prompt.py toy_world.py
"""

import gc
import itertools
import math
import sys
from functools import partial

from harness import flags, training_flags

TEXT_POSITIONS, VECTOR_POSITIONS = ("system", "user"), ("prefix", "before-response")


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    positive, rate = flags.number(float, above=0), flags.number(float, least=0)
    add = parser.group("model")
    names = "--model", "--base-model-path", "--policy-model-path"
    add(*names, default="Qwen/Qwen2.5-1.5B-Instruct", help="folder, hub id or `toy`, data too")
    add("--ref-model-path", "--reference-model-path", metavar="MODEL", help="the reference, where it is another model")
    add = parser.group("data")
    pairs = "data/train/helpful_pairs.jsonl"
    add("--dataset-path", "--dataset", default=pairs, metavar="DATASET", help="pairs: file, folder, hub id or `toy`")
    names = "--test-dataset-path", "--eval-dataset"
    add(*names, metavar="DATASET", help="evaluate on these pairs instead of holding some out")
    add = parser.group("preference")
    add("--preference-text", metavar="TEXT", help="the preference, in words")
    add("--use-prompt-embedding", action="store_true", help="the preference is a soft prompt")
    add("--prompt-embedding-path", metavar="PATH", help="its folder or file: .safetensors, .pt")
    positions = (*TEXT_POSITIONS, *VECTOR_POSITIONS)
    what = "where the preference goes (default: system for a text in messages, a soft prompt where it was trained)"
    add("--preference-position", choices=positions, help=what)
    add = parser.group("method")
    add("--teacher", choices=("policy", "ref"), default="policy", help="whose margin behind the preference is the aim")
    add("--alpha", type=rate, default=0.1, metavar="A", help="weight of the pull to the teacher's margin")
    add("--lambda-kl", type=rate, default=0.1, metavar="L", help="weight of the KL to the reference, on plain prompts")
    add("--beta", "--β-ori", type=positive, default=0.05, help="strength of DPO's pull to the reference")
    add("--nll-coeff", type=rate, default=0.0, metavar="C", help="weight of chosen's NLL in the loss")
    documented = dict(batch_size=1, gradient_accumulation_steps=512, lora_learning_rate=5e-4, lora_dropout=0.1)
    documented |= dict(max_length=300, max_prompt_length=128, output_dir="model_output/Preference_Guided_DPO")
    training_flags.add_common_flags(parser, **documented)
    parser.set_defaults(logging_dir="logs/Preference_Guided_DPO")
    args = training_flags.parse(parser, argv)
    if args.use_prompt_embedding != bool(args.prompt_embedding_path):
        parser.error("--use-prompt-embedding and --prompt-embedding-path PATH go together: give both or neither")
    if args.use_prompt_embedding and args.preference_text is not None:
        parser.error("--preference-text and --use-prompt-embedding are two ways to say the preference: choose one")
    if not args.use_prompt_embedding and args.preference_text is None:
        parser.error('there is no preference: give --preference-text "...", or --use-prompt-embedding with its path')
    fitting = VECTOR_POSITIONS if args.use_prompt_embedding else TEXT_POSITIONS
    if args.preference_position and args.preference_position not in fitting:
        what = "a soft prompt" if args.use_prompt_embedding else "a text"
        parser.error(f"--preference-position {args.preference_position} is not for {what}: {' or '.join(fitting)}")
    training_flags.take_toy(args, "dataset_path", "test_dataset_path")
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
from losses import PAIR_METRICS, aligned_loss, displacement, dpo_loss, nll_loss, pair_metrics
from packed_model import prepare_model
from packing import epoch_plan, hold_out, largest_pass, pack, passes_of_rank, rows_of_run, send
from preference_data import DataError, Pair, fingerprint, load_pairs
from preference_prompt import PromptError, check_room, read_soft_prompt, use_soft_prompt, with_text, with_virtual_tokens

TOY_FOLDER = "outputs/toy_world"
TOY = {"model": "model", "dataset_path": "train/polite_pairs.jsonl", "test_dataset_path": "test/polite_pairs.jsonl"}


OWN = """loss_components/dpo_loss loss_components/aligned_loss preference_metrics/pref_delta_chosen
    preference_metrics/pref_delta_rejected preference_metrics/log_pref_advantage
    preference_metrics/pref_advantage_ratio preference_metrics/pref_gap preference_metrics/gap_closed""".split()
METRICS = ["loss", *OWN, *PAIR_METRICS, "nll_loss"]  # in the order of pair_losses
GAP, CLOSED = OWN[-2:]
KL = "loss_components/kl_div"  # a mean over response tokens: behind METRICS come its sum and the number of these
DOCUMENTED = {"loss/train": "loss", "rewards_train/accuracy": "rewards/accuracies"}
SHOWN = ["loss", *OWN[:2], KL, "rewards/accuracies", "rewards/margins", "logps/chosen", *OWN[4:6], CLOSED]
SHOWN = {name: name if name in PAIR_METRICS else name.rpartition("/")[2] for name in SHOWN}  # and how it is called


def pair_losses(policy, batch, prompted, facts, args, reference=None):
    """Losses of a packed batch without the KL (B,); the KL, a sum over each pair's response tokens (B,); and METRICS,
    KL and response tokens of each pair (len(METRICS) + 2, B), without gradient.

    facts (B, 4): log-probs of chosen and rejected under the reference, and under it behind the preference, NaN where
    nobody asks.  prompted: the pairs behind the preference, packed, where the policy is the teacher, else None.
    reference: its states, where there is a KL.
    """
    policy_chosen_logps, policy_rejected_logps, *kl = policy.packed_logps(batch, reference)
    ref_chosen_logps, ref_rejected_logps, *teacher = facts.unbind(1)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    margin, ref_margin = policy_chosen_logps - policy_rejected_logps, ref_chosen_logps - ref_rejected_logps
    gap = teacher[0] - teacher[1] - ref_margin  # what the preference is worth to the reference
    if prompted:
        was_training = policy.training
        policy.eval()  # the teacher has no dropout
        with torch.no_grad():
            teacher = policy.packed_logps(prompted)
        policy.train(was_training)
    dpo = losses = dpo_loss(*policy_and_ref, args.beta)[0]
    aligned = aligned_loss(margin, teacher[0] - teacher[1])
    chosen_lengths, rejected_lengths = batch.response_lengths.chunk(2)
    nll = nll_loss(policy_chosen_logps, chosen_lengths)
    if args.nll_coeff:
        losses = losses + args.nll_coeff * nll
    if args.alpha:
        losses = losses + args.alpha * aligned
    deltas = teacher[0] - policy_chosen_logps, teacher[1] - policy_rejected_logps
    advantage = deltas[0] - deltas[1]  # its exponential may overflow: the mean of the logarithm is the one to trust
    metrics = [losses, dpo, aligned, *deltas, advantage, advantage.exp(), gap, margin - ref_margin]
    kl = sum(kl) if kl else torch.zeros_like(losses)
    metrics += [*pair_metrics(*policy_and_ref, args.beta), nll, kl, chosen_lengths + rejected_lengths]
    return losses, kl, torch.stack([values.detach().to(losses.dtype) for values in metrics])


def as_means(sums, num_pairs, args):
    """{metric: mean} of sums over pairs of METRICS, KL and response tokens; without those of OWN that nobody asked for.

    gap_closed becomes a share: of what the preference is worth to the reference, what the policy has without it.
    """
    *sums, kl, num_tokens = sums
    means = {name: total / num_pairs for name, total in zip(METRICS, sums, strict=True)}
    means[CLOSED] = means[CLOSED] / means[GAP] if means[GAP] else math.nan
    if args.lambda_kl:
        means[KL] = kl / num_tokens
        means["loss"] += args.lambda_kl * means[KL]
    return {name: mean for name, mean in means.items() if name not in OWN or not math.isnan(mean)}


@torch.no_grad()
def reference_states(reference, batch):
    """What the KL compares with: the reference is the policy with its adapter off, or a model of its own."""
    with lora.use_adapter(reference, None):
        return reference.response_states(batch)


def evaluate(policy, reference, pairs, prompted_pairs, facts, held_out, share, args, world):
    """Means over held-out pairs of all ranks {eval_name: mean} and half their 95 % intervals {eval_name_ci95: ...}."""

    def measure(indices):
        batch, rows = pack([pairs[i] for i in indices], world.device), send(facts[indices], world.device)
        prompted = pack([prompted_pairs[i] for i in indices], world.device) if args.teacher == "policy" else None
        states = reference_states(reference, batch) if reference else None
        return pair_losses(policy, batch, prompted, rows, args, states)[2]

    sums, squares = distributed.sums_over_ranks(share(held_out), len(METRICS) + 2, measure, world)
    means, squares = (sums / len(held_out)).tolist(), (squares / len(held_out)).tolist()
    half = [1.96 * (max(square - mean**2, 0) / len(held_out)) ** 0.5 for mean, square in zip(means, squares)]
    result = {f"eval_{name}": mean for name, mean in as_means(sums.tolist(), len(held_out), args).items()}
    plain = [name for name in METRICS if f"eval_{name}" in result and name not in ("loss", CLOSED)]
    return result | {f"eval_{name}_ci95": half[METRICS.index(name)] for name in plain}


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
    if toys := [name for name in TOY if getattr(args, name) == "toy"]:
        toy = distributed.main_first(world, lambda: toy_world.build(TOY_FOLDER))
        vars(args).update((name, str(toy / TOY[name])) for name in toys)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args)
    if args.lora_r:  # a wrong target shows here
        lora.add_adapter(skeleton, "policy", args.lora_r, args.lora_alpha, 0.0, args.lora_target_modules)
    other = load_skeleton(args.ref_model_path, tokenizer, args) if args.ref_model_path else None
    estimate = memory_estimate.Estimate(skeleton, world.size, other)
    if args.estimate_memory:
        say(memory_report.report(estimate, args))
        return distributed.stop()
    vectors, position = None, args.preference_position or "system"
    if args.use_prompt_embedding:
        width = skeleton.get_input_embeddings().weight.shape[1]
        vectors, trained_for = read_soft_prompt(args.prompt_embedding_path, width)
        position = args.preference_position or trained_for or "prefix"
        if trained_for not in (None, position):
            say(f"note: this soft prompt was trained for --preference-position {trained_for}, and is used {position}")
        say(f"soft prompt: {len(vectors)} vectors of width {width}, {position}, from {args.prompt_embedding_path}")
    elif (length := len(tokenizer(args.preference_text)["input_ids"])) > args.max_prompt_length:
        what = f"--preference-text has {length} tokens, beyond --max-prompt-length {args.max_prompt_length}"
        raise PromptError(f"{what}: say it in fewer words, or allow longer prompts")
    prefer = None if vectors is not None else partial(with_text, text=args.preference_text, position=position)
    names = "max_length max_prompt_length skip_invalid chat_template_strings".split()
    read = partial(load_pairs, tokenizer=tokenizer, prefer=prefer, **{name: getattr(args, name) for name in names})
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
    if vectors is not None:
        insert = partial(with_virtual_tokens, num_vectors=len(vectors), position=position)
        pairs = [pair._replace(prompted_ids=insert(pair.prompt_ids)) for pair in pairs]
    prompted_pairs = [Pair(pair.prompted_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    check_room(skeleton.config, prompted_pairs, args.model)
    text = "" if vectors is not None else f"  {tokenizer.decode(prompted_pairs[0].prompt_ids)!r}"
    say(f"  row 0 prompt   {len(prompted_pairs[0].prompt_ids):4} tokens with the preference{text}")
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
    preference = fingerprint(prompted_pairs)
    if vectors is not None:
        preference += score_cache.weights_sha256([("soft prompt", vectors)])
    if world.size > 1:
        facts = {"data": fingerprint(pairs), "checkpoint": checkpoint and checkpoint.name, "preference": preference}
        distributed.check_same_on_all_ranks(run_files.flags_of_a_run(args) | facts, world)

    # 3 models
    watch.phase("load")
    dtype = device.pick_dtype(args.dtype, world, checkpoints.begun_in(checkpoint))
    weights_dtype = dtype if args.lora_r else torch.float32  # weights that are trained are fp32, computed with in dtype
    load = partial(load_model, device="cpu" if sharded else world.device, trust_remote_code=args.trust_remote_code)
    policy = reference = load(args.model, weights_dtype)
    distributed.seed_everything(args.seed)
    parameters = list(policy.parameters())
    if args.lora_r:
        adapter = args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules
        parameters = lora.add_adapter(policy, "policy", *adapter)
    say(f"{prepare_model(policy)} ({world.device}, {str(dtype).removeprefix('torch.')})")
    checkpointing = estimate.checkpointing(args, device.room(world), largest_pass(**within), policy.packs_pairs)
    if checkpointing:
        enable_checkpointing(policy)
        say("gradient checkpointing: on")
    if args.ref_model_path or (args.lambda_kl and not args.lora_r):  # else the policy before its first update
        reference = load(args.ref_model_path or args.model, weights_dtype)
        prepare_model(reference)
    identity = run_files.identity(__file__, args, world, dtype, fingerprint([pairs[i] for i in train]), policy)
    identity["preference"] = preference
    if world.is_main:
        identity["reference"] = identity["base model"]
        if reference is not policy:
            identity["reference"] = score_cache.frozen_sha256(reference)
        if checkpoint:
            checkpoints.check_identity(checkpoint, identity)
    if sharded:
        parameters = sharding.shard(policy, reference, world, dtype, say, args.optimizer_offload)
    for model in dict.fromkeys((reference, policy)) if vectors is not None else ():  # `model` keeps the last
        use_soft_prompt(model, vectors.to(world.device))
    autocast = torch.autocast(world.device.type, dtype, enabled=weights_dtype != dtype)
    watch.phase("cache")
    termination = checkpoints.Termination()

    def frozen_logps(rows, role, sha256, needed):
        """What the reference gives to chosen and rejected of each row, once and for all: (N, 2), those `needed`."""
        mine = within | {"lengths": [sum(map(len, row[:3])) for row in rows]}
        with lora.use_adapter(reference, None), autocast:
            return score_cache.frozen_scores(
                args.cache_dir or f"{args.output_dir}/cache",
                role,
                sha256,
                fingerprint(rows),
                f"{dtype}{' sharded' * sharded}",
                lambda indices: reference.packed_logps(pack([rows[i] for i in indices], world.device)),
                len(rows),
                needed,
                partial(passes_of_rank, rank=world.rank, **mine),
                world,
                termination,
                say,
            )

    facts = torch.full((len(pairs), 4), math.nan)
    facts[:, :2] = frozen_logps(pairs, "reference", identity.get("reference"), needed)
    asked = needed if args.alpha and args.teacher == "ref" else held_out
    if asked:
        sha256 = world.is_main and identity["reference"] + identity["preference"][64:]
        facts[asked, 2:] = frozen_logps(prompted_pairs, "prompted", sha256, asked)[asked]
    watch.phase("other")
    reference = reference if args.lambda_kl else None  # else it has said all it has to say
    gc.collect()  # a sharded model has methods that hold it
    say(*memory_report.start_lines("policy model", parameters, policy, args, world), sep="\n")

    # 4 optimiser
    optimizer = optimizers.make_optimizer(parameters, args)
    scheduler = optimizers.make_scheduler(optimizer, args, num_updates, say)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    distributed.assert_same_on_all_ranks(parameters, world)
    distributed.seed_everything(args.seed + world.rank)  # from here on chance (dropout) differs between ranks

    # 5 train
    window = torch.zeros(len(METRICS) + 2, device=world.device)  # sums of METRICS since the last log line
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
            metrics = evaluate(policy, reference, pairs, prompted_pairs, facts, held_out, share, args, world)
        policy.train()
        flags.check_held_out(metrics["eval_loss"], at["step"])
        log.write(at["step"], at["step"] / updates_per_epoch, metrics)
        shown = [name for name in SHOWN if f"eval_{name}" in metrics]
        half = [f"±{metrics[key]:.4f}" if (key := f"eval_{name}_ci95") in metrics else "" for name in shown]
        numbers = (f"{SHOWN[name]}={metrics['eval_' + name]:.4f}{ci95}" for name, ci95 in zip(shown, half))
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
        in_update = [i for share in micro_batches for indices in share for i in indices]
        num_tokens = sum(len(ids) for i in in_update for ids in pairs[i][1:3])  # of responses
        for indices in micro_batches[world.rank]:
            watch.phase("forward")
            batch, rows = pack([pairs[i] for i in indices], world.device), send(facts[indices], world.device)
            asks = args.alpha and args.teacher == "policy"
            prompted = pack([prompted_pairs[i] for i in indices], world.device) if asks else None
            with autocast:
                states = reference_states(reference, batch) if args.lambda_kl else None
                losses, kl, metrics = pair_losses(policy, batch, prompted, rows, args, states)
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            loss = losses.sum() / num_pairs
            if args.lambda_kl:
                loss = loss + args.lambda_kl * kl.sum() / num_tokens
            watch.phase("backward")
            scaler.scale(loss).backward()
            window += metrics.sum(1)
        watch.phase("communicate")
        distributed.all_reduce_gradients(parameters, world)
        watch.phase("step")
        grad_norms.append(distributed.take_step(parameters, optimizer, scheduler, scaler, args.max_grad_norm))
        watch.phase("other")
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
            metrics = as_means(sums, at["pairs"], args)
            metrics |= {documented: metrics[name] for documented, name in DOCUMENTED.items()}
            metrics |= {"grad_norm": norms[-1], "learning_rate": scheduler.get_last_lr()[0]}
            metrics |= {"beta": args.beta, "num_tokens": at["tokens"]}
            log.write(step, step / updates_per_epoch, metrics)
            numbers = " ".join(f"{label}={metrics[name]:.4f}" for name, label in SHOWN.items() if name in metrics)
            numbers = f"{numbers} grad_norm={norms[-1]:.4f}"
            say(f"Epoch {epoch} step {step} {numbers} learning_rate={metrics['learning_rate']:.2e} {watch.rate()}")
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
            method = "preference-guided DPO"
            card = run_files.model_card(args, __file__, method, log.history, identity["data"], lora.left_out(policy))
            run_files.save_run_record(folder, log, args, __file__, card)
            if args.save_merged:
                lora.merge_adapter(policy, "policy")
                policy.save_pretrained(folder / "merged")
                model_files.save_tokenizer(tokenizer, folder / "merged")
        say(f"saved to {args.output_dir}")
    distributed.stop()


USER_ERRORS = (DataError, ModelError, lora.AdapterError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += (checkpoints.CheckpointError, memory_estimate.EstimateError, optimizers.OptimizerError, PromptError)

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
