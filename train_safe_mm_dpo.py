"""Safe-MM-DPO: learn from helpful and harmless preferences at once, with the expected cost held below a threshold.

    loss = (loss_H + lambda loss_S) / (1 + lambda) + kl_coeff KL(pi || ref)        --combine additive, the default
    loss_H, loss_S = -logsigmoid(beta(d) h) on helpful and on harmless rows        arXiv:2305.18290, 2502.10391
    loss = -logsigmoid(beta h - lambda ds)                                         --combine margin, arXiv:2310.03708
    loss = -p logsigmoid(beta h) - (1-p) logsigmoid(-beta h), p = sigmoid(dr + lambda ds)        --combine soft
    log lambda += lambda_lr lambda (E[cost] - threshold)                           arXiv:2310.12773

h is the policy's margin of log-ratios, dr and ds the margins of the helpful and the harmless reward model, d that of a
row's own model, cost = -harmless score.  margin and soft aim at ref exp((r - lambda c) / beta) exactly; additive does
not: for a large lambda it goes to the policy of the harmless pairs alone, which may cost more than the threshold.
Policy, reference and reward models are one frozen base with adapters where they share it.

Deviations from the papers: E[cost] is of offline prompts, sampled every few updates and held in between.

    python train_safe_mm_dpo.py --model toy --combine soft --beta 1 --learning-rate 1e-3 --cost-threshold auto  # laptop
    python train_safe_mm_dpo.py --config configs/dpo_config.yaml                            # one GPU
    torchrun --nproc_per_node=8 train_safe_mm_dpo.py --config configs/dpo_config.yaml       # eight GPUs

Copy with: formats/ harness/ distributed.py expected_cost.py lora.py lora_targets.py losses.py packed_attention.py
    packed_model.py packed_probe.py packing.py preference_data.py reward_models.py sampling.py toy_world.py
"""

import gc
import itertools
import math
import sys
from functools import partial

from harness import flags, training_flags

TASKS = "helpful", "harmless"
TOY = {f"{part}_{task}_path": f"{part}/{task}_pairs.jsonl" for part in ("train", "val") for task in TASKS}


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    positive, rate = flags.number(float, above=0), flags.number(float, least=0)
    add = parser.group("model")
    names = "--model", "--base-model-path", "--policy-model-path"
    add(*names, default="Qwen/Qwen3-0.6B", help="folder, hub id or `toy`, data too")
    add("--ref-model-path", "--reference-model-path", metavar="MODEL", help="the reference, where it is another model")
    for task in TASKS:
        add(f"--{task}-rm-path", default=f"models/{task}_rm", metavar="DIR", help=f"{task} model of train_rm.py")
    add = parser.group("data")
    for name, file in TOY.items():
        add(f"--{name.replace('_', '-')}", default=f"data/{file}", metavar="FILE", help="pairs, or `toy`")
    add = parser.group("method")
    modes = "additive", "margin", "soft"
    add("--combine", choices=modes, default="additive", help="how lambda weighs the two: the equations above")
    add("--beta", "--β-ori", type=positive, default=0.1, help="strength of the pull to the reference")
    add("--w", type=rate, help="beta rises by this share where a reward model is sure (default: 0.5 for additive)")
    add("--k", type=rate, default=0.5, help="how fast it rises with the reward model's margin")
    add("--kl-coeff", type=rate, metavar="C", help="weight of the KL to the reference (default: 0.1 for additive)")
    add("--nll-coeff", type=rate, default=0.0, metavar="C", help="weight of the preferred response's NLL in the loss")
    add("--lambda-init", "--λ-init", type=rate, default=1.0, metavar="L", help="0: helpful rows alone, no constraint")
    add("--lambda-lr", "--λ-lr", type=rate, default=0.01, metavar="R", help="rate of log lambda; 0: lambda is fixed")
    add("--lambda-min", type=positive, default=1e-6, metavar="L", help="lambda is at least this")
    add("--lambda-max", type=positive, default=10.0, metavar="L", help="lambda is at most this")
    number_or_auto = lambda text: text if text == "auto" else flags.number(float)(text)  # noqa: E731
    add("--cost-threshold", type=number_or_auto, default=0.0, metavar="T", help="of E[cost]; auto: docs/safe_mm_dpo.md")
    what = "E[cost] from sampled responses, or from the pairs by importance weights: those have to be the reference's"
    add("--cost-estimate", choices=("policy", "snis"), default="policy", help=what)
    add("--cost-every", type=flags.number(int, least=1), default=8, metavar="N", help="updates between two samples")
    add("--cost-prompts", choices=("harmless", "all"), default="harmless", help="whose rows' prompts E[cost] is over")
    documented = dict(epochs=2, batch_size=4, gradient_accumulation_steps=4, learning_rate=5e-7, lora_dropout=0.1)
    what = "rows of each validation file; 0: none (default: all)"
    training_flags.add_common_flags(parser, **documented, held_out=what, output_dir="models/aligned")
    parser.set_defaults(logging_dir="logs/training/safe_mm_dpo")
    args = training_flags.parse(parser, argv)
    if args.lambda_init and not args.lambda_min <= args.lambda_init <= args.lambda_max:
        parser.error(f"--lambda-init {args.lambda_init:g} is not within --lambda-min and --lambda-max")
    if args.combine != "additive" and (args.w or args.kl_coeff):
        what = f"--w {args.w or 0:g} and --kl-coeff {args.kl_coeff or 0:g}"
        flags.say(f"note: {what}: --combine {args.combine} is exact for ref exp((r - lambda c) / beta) with both 0")
    training_flags.take_toy(args, *TOY)
    args.w = args.w if args.w is not None else 0.5 * (args.combine == "additive")
    args.kl_coeff = args.kl_coeff if args.kl_coeff is not None else 0.1 * (args.combine == "additive")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch
from tqdm import tqdm

import distributed
import lora
import reward_models
import toy_world
from expected_cost import empty_window, importance_weighted, own_window, prompts_of, sampled_cost, slide
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
from losses import (
    PAIR_METRICS,
    Multiplier,
    displacement,
    dpo_loss,
    dynamic_beta,
    joint_loss,
    nll_loss,
    pair_metrics,
    soft_label_loss,
)
from packed_model import prepare_model
from packing import epoch_plan, joined, largest_pass, pack, passes, passes_of_rank, rows_of_run, send
from preference_data import DataError, fingerprint, load_pairs

TOY_FOLDER = "outputs/toy_world"
AT_CAP = 50  # updates that lambda may be at its cap before the log says so


COUNTS = "H", "S", "tokens", "pairs"  # what sums are divided by: rows of either label, response tokens, rows
METRICS = {"H": "loss_H accuracy_H beta_H", "S": "loss_S accuracy_S beta_S", "tokens": "KL", "pairs": "nll_loss"}
METRICS = {name: of for of, names in METRICS.items() for name in names.split()} | dict.fromkeys(PAIR_METRICS, "pairs")
KL, TOKENS = list(METRICS).index("KL"), len(METRICS) + COUNTS.index("tokens")  # places among both
CHANGES = list(METRICS).index("logps/chosen_change")  # and behind it rejected's


def pair_losses(policy, batch, facts, multiplier, args, reference=None):
    """Loss terms of a packed batch (4, B), and METRICS and COUNTS of each pair, without gradient.

    The terms: loss_H and loss_S (0 where a row has no such label), the joint loss of margin and soft, and, with the
    reference's states, the KL summed over tokens.  facts (B, 8): log-probs of chosen and rejected under the reference,
    margins of the helpful and the harmless model, the two betas, and the direction of the helpful and of the harmless
    label: 1 as the row stands, -1 the other way, 0 none.
    """
    policy_chosen_logps, policy_rejected_logps, *kl = policy.packed_logps(batch, reference)
    ref_chosen_logps, ref_rejected_logps, dr, ds, beta_H, beta_S, helpful, harmless = facts.unbind(1)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    lengths, kl = batch.response_lengths.chunk(2), sum(kl) if kl else torch.zeros_like(dr)
    h = policy_chosen_logps - ref_chosen_logps - (policy_rejected_logps - ref_rejected_logps)
    loss_H = dpo_loss(*policy_and_ref, beta_H)[0]
    loss_S = soft_label_loss(beta_S * h, (1 + harmless) / 2)  # dpo_loss in the label's own direction
    joint = joint_loss(args.combine, h, beta_H, dr, ds, helpful, multiplier)
    nll = nll_loss(policy_chosen_logps, lengths[0])
    if args.nll_coeff:
        loss_H, joint = loss_H + args.nll_coeff * nll, joint + args.nll_coeff * nll
        loss_S = loss_S + args.nll_coeff * torch.where(harmless < 0, nll_loss(policy_rejected_logps, lengths[1]), nll)
    in_H, in_S = helpful.abs(), harmless.abs()
    terms = torch.stack((in_H * loss_H, in_S * loss_S, joint, kl))
    metrics = [in_H * loss_H, in_H * (h > 0), in_H * beta_H, in_S * loss_S, harmless * h > 0, in_S * beta_S, kl, nll]
    metrics += pair_metrics(*policy_and_ref, args.beta)
    metrics += [in_H, in_S, sum(lengths) * (reference is not None), torch.ones_like(h)]
    return terms, torch.stack([values.detach().to(terms.dtype) for values in metrics])


def update_loss(terms, multiplier, counts, args):
    """What some rows add to the loss of an update: terms (4,) summed over them, counts of the whole update.

    Each term is divided by its own count over all passes and ranks: any split is the same gradient.
    """
    helpful, harmless, joint, kl = terms
    loss = joint / counts["pairs"]
    if args.combine == "additive":
        loss = (helpful / max(1, counts["H"]) + multiplier * harmless / max(1, counts["S"])) / (1 + multiplier)
    return loss + args.kl_coeff * kl / counts["tokens"] if args.kl_coeff else loss


@torch.no_grad()
def reference_states(reference, batch):
    """What the KL compares with: the reference is the policy with its adapter off, or a model of its own."""
    with lora.use_adapter(reference, None):
        return reference.response_states(batch)


def evaluate(policy, reference, pairs, facts, held_out, share, multiplier, args, world):
    """Means of METRICS over held-out pairs {eval_name: mean} and half their 95 % intervals {eval_name_ci95: ...}."""

    def measure(indices):
        batch, rows = pack([pairs[i] for i in indices], world.device), send(facts[indices], world.device)
        states = reference_states(reference, batch) if reference else None
        return pair_losses(policy, batch, rows, multiplier, args, states)[1]

    sums, squares = distributed.sums_over_ranks(share(held_out), len(METRICS) + len(COUNTS), measure, world).tolist()
    counts = dict(zip(COUNTS, sums[len(METRICS) :], strict=True))
    means = {
        name: (s / counts[of], q / counts[of]) for (name, of), s, q in zip(METRICS.items(), sums, squares) if counts[of]
    }
    result = {f"eval_{name}": mean for name, (mean, _) in means.items()}
    per_row = {name: pair for name, pair in means.items() if name != "KL"}  # its squares are of sums over tokens
    half = {x: 1.96 * (max(q - m**2, 0) / counts[METRICS[x]]) ** 0.5 for x, (m, q) in per_row.items()}
    return result | {f"eval_{name}_ci95": width for name, width in half.items()}


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
    if toys := [name for name in ("model", *TOY) if getattr(args, name) == "toy"]:
        toy = distributed.main_first(world, lambda: toy_world.build(TOY_FOLDER))
        vars(args).update((name, str(toy / TOY.get(name, "model"))) for name in toys)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    skeleton = load_skeleton(args.model, tokenizer, args)
    if args.lora_r:  # a wrong target shows here
        lora.add_adapter(skeleton, "policy", args.lora_r, args.lora_alpha, 0.0, args.lora_target_modules)
    other = load_skeleton(args.ref_model_path, tokenizer, args) if args.ref_model_path else None
    needed = {"helpful": args.w or args.combine != "additive"}
    needed["harmless"] = args.lambda_init and (args.w or args.lambda_lr or args.combine != "additive")
    folders = {task: getattr(args, f"{task}_rm_path") for task in TASKS if needed[task]}
    estimate = memory_estimate.Estimate(skeleton, world.size, other, folders)
    if args.estimate_memory:
        say(memory_report.report(estimate, args))
        return distributed.stop()
    records = {
        task: reward_models.read_record(folder, task, tokenizer, args.trust_remote_code)
        for task, folder in folders.items()
    }
    if "harmless" in records:  # an `auto` that cannot be is told before anything loads
        reward_models.threshold(args.cost_threshold, records["harmless"], start_cost=0.0)
    watch.phase("tokenise")
    names = "max_length max_prompt_length skip_invalid chat_template_strings".split()
    read = partial(load_pairs, tokenizer=tokenizer, **{name: getattr(args, name) for name in names})
    pairs, labels, places = [], [], {"train": [], "val": []}
    for part, limit in (("train", args.num_samples), ("val", args.eval_samples or 0)):
        both = {task: [] for task in TASKS}
        for task in TASKS if args.lambda_init else TASKS[:1]:  # without a constraint no harmless file is needed
            if part == "train" or args.eval_samples != 0:
                both[task], report = read(getattr(args, f"{part}_{task}_path"), limit=limit)
                say(*report, sep="\n")
        rows, directions = joined(both["helpful"], both["harmless"])
        places[part] = list(range(len(pairs), len(pairs) + len(rows)))
        pairs, labels = pairs + rows, labels + directions
    (train, held_out), labels = places.values(), torch.tensor(labels, dtype=torch.float32)  # (N, 2) in 1, -1, 0
    counted = (f"{int(n):,} with a {task} label" for task, n in zip(TASKS, labels[train].abs().sum(0).tolist()))
    say(f"{len(train):,} pairs to train on, {', '.join(counted)}")
    lengths = [sum(map(len, pair[:3])) for pair in pairs]
    within = dict(ranks=world.size, batch_size=args.batch_size, lengths=lengths, budget=args.tokens_per_microbatch)
    split = partial(passes, batch_size=args.batch_size, budget=args.tokens_per_microbatch)
    share = partial(passes_of_rank, rank=world.rank, **within)
    accumulation = args.gradient_accumulation_steps
    plan_epoch = partial(epoch_plan, train, seed=args.seed, accumulation=accumulation, **within)
    updates_per_epoch = len(plan_epoch(epoch=0))
    num_updates = min(args.epochs * updates_per_epoch, args.max_steps or sys.maxsize)
    needed = rows_of_run(plan_epoch, num_updates, held_out)  # of these a frozen model is asked
    costly = [i for i in train if args.cost_prompts == "all" or labels[i, 1]]  # rows whose prompts E[cost] is over
    prompts = prompts_of([pairs[i] for i in costly], tokenizer.eos_token_id)
    if world.size > 1:
        facts = {"data": fingerprint(pairs), "checkpoint": checkpoint and checkpoint.name}
        facts |= {f"{task} reward model": record.get("validation") for task, record in records.items()}
        distributed.check_same_on_all_ranks(run_files.flags_of_a_run(args) | facts, world)

    # 3 models
    watch.phase("load")
    dtype = device.pick_dtype(args.dtype, world, checkpoints.begun_in(checkpoint))
    weights_dtype = dtype if args.lora_r else torch.float32  # weights that are trained are fp32, computed with in dtype
    load = partial(load_model, device="cpu" if sharded else world.device, trust_remote_code=args.trust_remote_code)
    policy = reference = load(args.model, weights_dtype)
    if args.ref_model_path or (args.kl_coeff and not args.lora_r):  # else the policy before its first update
        reference = load(args.ref_model_path or args.model, weights_dtype)
        prepare_model(reference)
    home, sha256 = (policy, score_cache.base_sha256(policy)) if records and args.lora_r else (None, None)
    judges = {}
    for task, folder in folders.items():
        judges[task] = reward_models.load(folder, task, records[task], home, sha256, args, dtype, world.device)
        say(judges[task].line)
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
    autocast = torch.autocast(world.device.type, dtype, enabled=weights_dtype != dtype)
    watch.phase("cache")
    termination = checkpoints.Termination()
    identity = run_files.identity(__file__, args, world, dtype, fingerprint([pairs[i] for i in train]), policy)
    identity["tokens of a sampled response"] = args.max_length - args.max_prompt_length  # the data does not say it
    base_of = lambda model: identity["base model"] if model is policy else score_cache.frozen_sha256(model)
    frozen = {"reference": reward_models.RewardModel({}, reference, None, None, "")} | judges
    for role, judge in frozen.items():
        weights = lora.adapter_state(judge.model, judge.adapter)
        weights |= {} if judge.head is None else {"head": judge.head}
        identity[role] = world.is_main and base_of(judge.model) + score_cache.weights_sha256(weights.items())
    if checkpoint and world.is_main:
        checkpoints.check_identity(checkpoint, identity)
    if sharded:
        parameters = sharding.shard(policy, reference, world, dtype, say, args.optimizer_offload)
    # Without samples the start's E[cost] is of all pairs.
    costed = sorted({*needed, *costly}) if args.cost_estimate == "snis" else needed
    known = {}  # what the frozen models say of the pairs once and for all, (N, 2) each
    for role, judge in frozen.items():
        ask = judge.model.packed_logps if role == "reference" else partial(judge.model.packed_scores, head=judge.head)
        with lora.use_adapter(judge.model, judge.adapter), autocast:
            known[role] = score_cache.frozen_scores(
                args.cache_dir or f"{args.output_dir}/cache",
                role,
                identity[role],
                fingerprint(pairs),
                f"{dtype}{' sharded' * sharded}",
                lambda indices, ask=ask: ask(pack([pairs[i] for i in indices], world.device)),
                len(pairs),
                costed if role == "harmless" else needed,
                share,
                world,
                termination,
                say,
            )
    nothing = torch.zeros(len(pairs), 2)
    margins = [known.get(task, nothing)[:, 0] - known.get(task, nothing)[:, 1] for task in TASKS]
    betas = torch.full_like(labels, math.nan)  # of rows that nobody needs, as the rest of what is not known of them
    for side in (0, 1):
        betas[needed, side] = dynamic_beta((labels[:, side] * margins[side])[needed], args.beta, args.w, args.k)
    facts = torch.cat((known["reference"], torch.stack(margins, dim=1), betas, labels), dim=1)  # (N, 8)
    costs = -known.get("harmless", nothing)
    judge = judges.get("harmless") if args.cost_estimate == "policy" else None  # the one that is still asked
    for task in judges:
        if judges[task] is not judge and judges[task].model is policy:
            lora.remove_adapter(policy, task)
    frozen = judges = ask = weights = None  # the others leave memory
    reference = reference if args.kl_coeff or (args.lora_r and reference is policy) else None
    gc.collect()  # a sharded model has methods that hold it
    say(*memory_report.start_lines("policy model", parameters, policy, args, world), sep="\n")

    # 4 optimiser
    optimizer = optimizers.make_optimizer(parameters, args)
    scheduler = optimizers.make_scheduler(optimizer, args, num_updates, say)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    multiplier = Multiplier(args.lambda_init, args.lambda_lr, args.lambda_min, args.lambda_max)
    distributed.assert_same_on_all_ranks(parameters, world)
    distributed.seed_everything(args.seed + world.rank)  # from here on chance (dropout) differs between ranks

    # 5 train
    window = torch.zeros(len(METRICS) + len(COUNTS), device=world.device)  # sums since the last log line
    samples = empty_window(world.size, world.device)
    pair_flops = speed.useful_flops(policy, pairs)
    grad_norms = []  # since the last log line, on the device: to look at each at once would wait for it
    at = {"step": 0, "tokens": 0, "warned": [], "cost": math.nan, "ess": math.nan, "threshold": 0.0, "history": None}
    if checkpoint:
        tensors, at = checkpoints.restore(checkpoint, parameters, optimizer, scheduler, scaler, world)
        multiplier.load(at["multiplier"])
        window += checkpoints.own_sums(tensors["window"], world)
        samples = own_window(tensors["samples"], world.rank, world.size).to(world.device)
        say(f"resumed from {checkpoint}")
    log = run_files.MetricsLog(args, world.is_main, checkpoint, at["history"])
    bar = tqdm(total=num_updates, initial=at["step"], desc="updates", disable=not distributed.shows_bars(world))

    def estimate_cost():
        """at["cost"], E[cost] under the policy as far as it can be told now."""
        if judge and at["step"] % args.cost_every == 0:
            with autocast:
                at["cost"] = sampled_cost(policy, judge, prompts, tokenizer, split, at["step"], args, world)
        elif not judge:
            at["cost"], at["ess"] = importance_weighted(distributed.gather(samples, world))

    def warn(what, sentence):
        if what not in at["warned"]:
            at["warned"].append(what)
            say(sentence)

    def evaluate_and_log():
        policy.eval()
        with autocast:
            metrics = evaluate(policy, reference, pairs, facts, held_out, share, multiplier.value, args, world)
        policy.train()
        flags.check_held_out(metrics.get("eval_loss_H", 0) + metrics.get("eval_loss_S", 0), at["step"])
        log.write(at["step"], at["step"] / updates_per_epoch, metrics)
        shown = [name for name in ("loss_H", "accuracy_H", "loss_S", "accuracy_S") if f"eval_{name}" in metrics]
        numbers = [f"{name}={metrics['eval_' + name]:.4f}±{metrics[f'eval_{name}_ci95']:.4f}" for name in shown]
        say(f"Held out, step {at['step']}:", *numbers, *[f"KL={metrics[k]:.4f}" for k in ("eval_KL",) if k in metrics])

    def save_checkpoint():
        flags.check_weights(parameters, at["step"])
        tensors = {"chance": distributed.gather(checkpoints.chance(world.device), world)}
        tensors |= {"window": distributed.gather(window, world), "samples": distributed.gather(samples, world)}
        at.update(identity=identity, history=log.history, multiplier=multiplier.state())
        checkpoints.save(args, world, parameters, optimizer, scheduler, scaler, tensors, at, say)

    def save_policy(folder, state):
        if args.lora_r:
            lora.save_adapter(policy, "policy", folder, args.model)
        else:
            save_whole(policy, folder, state)
        model_files.save_tokenizer(tokenizer, folder)

    if not checkpoint:
        if "harmless" in known:
            start = -known["harmless"][costly].mean().item()  # of the pairs, where nothing is sampled
            if judge:  # an uncalibrated `auto` stands on it: from several draws
                draws = 4 if args.cost_threshold == "auto" and not records["harmless"]["calibrated"] else 1
                ask = partial(sampled_cost, policy, judge, prompts, tokenizer, split, args=args, world=world)
                with autocast:
                    start = at["cost"] = sum(ask(step=-n) for n in range(draws)) / draws
            at["threshold"], how = reward_models.threshold(args.cost_threshold, records["harmless"], start)
            say(f"E[cost] before training {start:.4f}; threshold {at['threshold']:.4f}: {how}")
            asked = costs[sorted({*costly} & {*costed})]
            if len(asked) and not asked.min() <= at["threshold"] <= asked.max():
                side, then = ("above", "cannot be met") if asked.min() > at["threshold"] else ("below", "never binds")
                what = f"a cost {side} the threshold ({asked.min().item():.4f} to {asked.max().item():.4f})"
                say(f"The harmless model gives all of the training responses {what}: the constraint {then}")
        if held_out:
            evaluate_and_log()
    policy.train()
    updates = itertools.chain.from_iterable(plan_epoch(epoch=epoch) for epoch in itertools.count())
    for num_pairs, micro_batches in itertools.islice(updates, at["step"], num_updates):
        in_update = [i for share in micro_batches for indices in share for i in indices]
        responses = sum(len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in in_update)  # their tokens
        counts = dict(zip(COUNTS, (*labels[in_update].abs().sum(0).tolist(), responses, num_pairs), strict=True))
        for indices in micro_batches[world.rank]:
            watch.phase("forward")
            batch, rows = pack([pairs[i] for i in indices], world.device), send(facts[indices], world.device)
            with autocast:
                states = reference_states(reference, batch) if args.kl_coeff else None
                terms, metrics = pair_losses(policy, batch, rows, multiplier.value, args, states)
                loss = update_loss(terms.sum(1), multiplier.value, counts, args)
            watch.phase("backward")
            scaler.scale(loss).backward()
            window += metrics.sum(1)
            if args.cost_estimate == "snis":
                counted = [place for place, i in enumerate(indices) if args.cost_prompts == "all" or labels[i, 1]]
                changes = metrics[CHANGES : CHANGES + 2, counted]  # log pi/ref of chosen and rejected
                samples = slide(samples, changes.flatten(), send(costs[indices][counted].t().flatten(), world.device))
        logs = (at["step"] + 1) % args.logging_steps == 0 or at["step"] + 1 == num_updates
        if logs and reference and not args.kl_coeff and micro_batches[world.rank]:  # to be seen, of the last pass
            policy.eval()  # no dropout: what is logged draws nothing from chance
            with torch.no_grad(), autocast:
                states = reference_states(reference, batch)
                seen = pair_losses(policy, batch, rows, multiplier.value, args, states)[1].sum(1)
            policy.train()
            window[[KL, TOKENS]] += seen[[KL, TOKENS]]
        watch.phase("communicate")
        distributed.all_reduce_gradients(parameters, world)
        watch.phase("step")
        grad_norms.append(distributed.take_step(parameters, optimizer, scheduler, scaler, args.max_grad_norm))
        watch.phase("cost")
        at["step"] += 1
        at["tokens"] += sum(lengths[i] for i in in_update)
        if "harmless" in known:
            estimate_cost()
            multiplier.update(at["cost"] - at["threshold"])
            log.write_lambda(
                at["step"], {"lambda": multiplier.value, "J_C": multiplier.violation, "E_cost": at["cost"]}
            )
        watch.phase("other")
        watch.work(num_pairs, sum(pair_flops[i] for i in in_update))
        bar.update()
        if at["step"] == 1 and world.device.type == "cuda":
            say(memory_report.first_update(estimate, args, checkpointing, micro_batches, lengths))

        step, epoch = at["step"], (at["step"] - 1) // updates_per_epoch + 1
        if logs:
            sums, norms = distributed.all_reduce_sum(window, world).tolist(), torch.stack(grad_norms).tolist()
            counts = dict(zip(COUNTS, sums[len(METRICS) :], strict=True))
            metrics = {name: total / (counts[of] or math.nan) for (name, of), total in zip(METRICS.items(), sums)}
            flags.check_norms(norms, step, scaler)
            metrics |= {"lambda": multiplier.value, "J_C": multiplier.violation, "E_cost": at["cost"], "ess": at["ess"]}
            metrics |= {"cost_threshold": at["threshold"], "lambda_skipped": multiplier.skipped}
            metrics |= {"grad_norm": norms[-1], "learning_rate": scheduler.get_last_lr()[0], "num_tokens": at["tokens"]}
            log.write(step, step / updates_per_epoch, metrics)
            shown = "loss_H loss_S KL lambda J_C E_cost beta_H beta_S ess accuracy_H accuracy_S grad_norm".split()
            numbers = " ".join(f"{name}={metrics[name]:.4f}" for name in shown if math.isfinite(metrics[name]))
            say(f"Epoch {epoch} step {step} {numbers} learning_rate={metrics['learning_rate']:.2e} {watch.rate()}")
            if fall := displacement(metrics):
                warn("fall", fall)
            if multiplier.at_cap >= AT_CAP:
                met = f"E[cost] {at['cost']:.4f} is to be at most {at['threshold']:.4f}"
                warn(
                    "cap",
                    f"lambda has been at its cap of {args.lambda_max:g} for {multiplier.at_cap} updates: {met}.\n"
                    "Ask for less (--cost-threshold), allow more (--lambda-max), or weigh otherwise (--combine).",
                )
            window.zero_()
            grad_norms.clear()
        if held_out and (step == num_updates or (args.eval_steps and step % args.eval_steps == 0)):
            evaluate_and_log()
        if step % updates_per_epoch == 0:
            flags.check_weights(parameters, step)
            state = None if args.lora_r else sharding.whole_state(policy, dtype, world)
            if world.is_main:
                with run_files.whole_files(args.output_dir) as folder:
                    save_policy(folder / f"epoch_{epoch}", state)
            say(f"Saved epoch {epoch} checkpoint to {args.output_dir}/epoch_{epoch}")
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
    distributed.assert_same_on_all_ranks([*parameters, torch.tensor([multiplier.value], device=world.device)], world)
    log.close()
    state = None if args.lora_r else sharding.whole_state(policy, dtype, world)
    if world.is_main:
        with run_files.whole_files(args.output_dir) as folder:
            save_policy(folder, state)
            card = run_files.model_card(
                args, __file__, "Safe-MM-DPO", log.history, identity["data"], lora.left_out(policy)
            )
            run_files.save_run_record(folder, log, args, __file__, card)
            if args.save_merged:
                lora.merge_adapter(policy, "policy")
                policy.save_pretrained(folder / "merged")
                model_files.save_tokenizer(tokenizer, folder / "merged")
        say(f"saved to {args.output_dir}")
    distributed.stop()


USER_ERRORS = (DataError, ModelError, lora.AdapterError, distributed.DeviceError, run_files.RunFolderError)
USER_ERRORS += checkpoints.CheckpointError, memory_estimate.EstimateError, optimizers.OptimizerError
USER_ERRORS += (reward_models.RewardModelError,)

if __name__ == "__main__":
    flags.run(main, ARGS, *USER_ERRORS)
