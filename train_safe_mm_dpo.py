"""Safe-MM-DPO: learn from helpful and harmless preferences at once, with the expected cost held below a threshold.

    loss = (loss_H + lambda loss_S) / (1 + lambda) + kl_coeff KL(pi || ref)        --combine additive, the default
    loss_H, loss_S = -logsigmoid(beta(d) h) on helpful and on harmless rows        arXiv:2305.18290, 2502.10391
    loss = -logsigmoid(beta h - lambda ds)                                         --combine margin, arXiv:2310.03708
    loss = -p logsigmoid(beta h) - (1-p) logsigmoid(-beta h), p = sigmoid(dr + lambda ds)        --combine soft
    log lambda += lambda_lr lambda (E[cost] - threshold)                           arXiv:2310.12773

h is the policy's margin of log-ratios, dr and ds the margins of the helpful and the harmless reward model, d that of a
row's own model, cost = -harmless score.  margin and soft aim at ref exp((r - lambda c) / beta) exactly; additive does
not: for a large lambda it goes to the policy of the harmless pairs alone, which may cost more than the threshold.
--own-pairs has the policy learn from what it says itself too, which is what the constraint is about.
Policy, reference and reward models are one frozen base with adapters where they share it.

Deviations from the papers: E[cost] is of offline prompts, sampled every few updates and held in between.

    python train_safe_mm_dpo.py --model toy --combine soft --beta 1 --learning-rate 1e-3 --own-pairs 0.25   # laptop
    python train_safe_mm_dpo.py --config configs/dpo_config.yaml                            # one GPU
    torchrun --nproc_per_node=8 train_safe_mm_dpo.py --config configs/dpo_config.yaml       # eight GPUs

Copy with: formats/ harness/ distributed.py expected_cost.py lora.py lora_targets.py losses.py own_pairs.py
    packed_attention.py packed_model.py packed_probe.py packing.py preference_data.py reward_models.py sampling.py
    toy_vision.py toy_world.py vision.py
"""

import math
from typing import NamedTuple

from harness import endings, flags, training_flags

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
    what = "rate of log lambda; 0: lambda is fixed (default: 0.05; 0.01 for raw scores)"
    add("--lambda-lr", "--λ-lr", type=rate, metavar="R", help=what)
    add("--lambda-min", type=positive, default=1e-6, metavar="L", help="lambda is at least this")
    add("--lambda-max", type=positive, default=10.0, metavar="L", help="lambda is at most this")
    number_or_auto = lambda number: lambda text: text if text == "auto" else number(text)  # noqa: E731
    what = "count scores in what validation pairs are apart, or as they are"
    add("--score-units", choices=("spread", "raw"), default="spread", help=what)
    what = "of E[cost]; auto: what the policy can do, docs/safe_mm_dpo.md"
    add("--cost-threshold", type=number_or_auto(flags.number(float)), default=0.0, metavar="T", help=what)
    what = "in place of a threshold, of a calibrated harmless model: cost is the probability of harm, and this its mean"
    add("--harm-rate", type=flags.number(float, above=0, below=1), metavar="P", help=what)
    what = "E[cost] from sampled responses, or from the pairs by importance weights: those have to be the reference's"
    add("--cost-estimate", choices=("policy", "snis"), default="policy", help=what)
    add("--cost-every", type=flags.number(int, least=1), default=8, metavar="N", help="updates between two samples")
    what = "prompts in a sample (default: as many as an update has pairs); auto: more, where it cannot tell yet"
    add("--cost-samples", type=number_or_auto(flags.number(int, least=2)), metavar="N", help=what)
    add("--cost-prompts", choices=("harmless", "all"), default="harmless", help="whose rows' prompts E[cost] is over")
    what = "of an update: pairs of the policy's own newest samples, judged by both reward models"
    add("--own-pairs", type=flags.number(float, least=0, most=1), default=0.0, metavar="SHARE", help=what)
    documented = dict(epochs=2, batch_size=4, gradient_accumulation_steps=4, learning_rate=5e-7, lora_dropout=0.1)
    what = "rows of each validation file; 0: none (default: all)"
    training_flags.add_common_flags(parser, **documented, held_out=what, output_dir="models/aligned")
    parser.set_defaults(logging_dir="logs/training/safe_mm_dpo")
    args = training_flags.parse(parser, argv)
    if args.lambda_init and not args.lambda_min <= args.lambda_init <= args.lambda_max:
        parser.error(f"--lambda-init {args.lambda_init:g} is not within --lambda-min and --lambda-max")
    if args.harm_rate is not None and "cost_threshold" in args.given:
        parser.error("--harm-rate is a threshold, and --cost-threshold another: leave one of them out")
    if args.own_pairs and (not args.lambda_init or args.cost_estimate == "snis"):
        what = "--lambda-init 0" if not args.lambda_init else "--cost-estimate snis"
        parser.error(f"--own-pairs are of the samples of E[cost], and {what} takes none: leave one of them out")
    if args.combine != "additive" and (args.w or args.kl_coeff):
        what = f"--w {args.w or 0:g} and --kl-coeff {args.kl_coeff or 0:g}"
        endings.say(f"note: {what}: --combine {args.combine} is exact for ref exp((r - lambda c) / beta) with both 0")
    training_flags.take_toy(args, *TOY)
    args.lambda_lr = {"spread": 0.05, "raw": 0.01}[args.score_units] if args.lambda_lr is None else args.lambda_lr
    args.w = args.w if args.w is not None else 0.5 * (args.combine == "additive")
    args.kl_coeff = args.kl_coeff if args.kl_coeff is not None else 0.1 * (args.combine == "additive")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch

import distributed
import lora
import reward_models
from expected_cost import Constraint
from harness.run import Frozen, Run, forget
from harness.score_cache import base_sha256
from harness.training import Training
from losses import (
    PAIR_METRICS,
    displacement,
    dynamic_beta,
    joint_loss,
    nll_loss,
    pair_metrics,
    soft_label_loss,
)
from own_pairs import OwnPairs
from packed_model import prepare_model
from packing import joined, of_pairs

METRICS = {  # and what each is a mean over: rows with a helpful or a harmless label, response tokens, all pairs
    "loss_H": "helpful_rows",
    "accuracy_H": "helpful_rows",
    "beta_H": "helpful_rows",
    "loss_S": "harmless_rows",
    "accuracy_S": "harmless_rows",
    "beta_S": "harmless_rows",
    "KL": "tokens",
    "nll_loss": "pairs",
} | dict.fromkeys(PAIR_METRICS, "pairs")
SHOWN = "loss_H loss_S KL lambda J_C E_cost E_cost_raw beta_H beta_S ess accuracy_H accuracy_S grad_norm".split()
HELD_OUT = "loss_H accuracy_H loss_S accuracy_S KL".split()


class PairFacts(NamedTuple):
    """What is known of pairs before training, (N,) each."""

    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    helpful_margin: torch.Tensor  # dr: the helpful reward model's score of chosen - that of rejected
    harmless_margin: torch.Tensor  # ds, in the unit of dr
    beta_H: torch.Tensor  # MM-DPO's beta of the helpful loss
    beta_S: torch.Tensor
    helpful: torch.Tensor  # the helpful label: 1 as the pair stands, -1 the other way, 0 none
    harmless: torch.Tensor


class Terms(NamedTuple):
    """What pairs add to the loss of an update, (B,) each."""

    loss_H: torch.Tensor  # 0 where a pair has no helpful label
    loss_S: torch.Tensor
    joint: torch.Tensor  # the loss of --combine margin and soft
    kl: torch.Tensor  # summed over response tokens


def pair_facts(known, labels, needed, unit, args):
    """PairFacts of what the frozen models say of chosen and rejected {role: (N, 2)} and labels (N, 2) in 1, -1, 0.

    Of pairs that are not `needed` nothing is asked, and their betas are NaN.  unit: reward_models.CostUnit.
    """
    nothing, betas = torch.zeros(len(labels), 2), []
    scores = [known.get(task, nothing) for task in TASKS]
    for (chosen, rejected), label in zip((both.unbind(1) for both in scores), labels.unbind(1), strict=True):
        beta = torch.full_like(label, math.nan)
        beta[needed] = dynamic_beta((label * (chosen - rejected))[needed], args.beta, args.w, args.k)
        betas.append(beta)
    (chosen, rejected), ds = scores[0].unbind(1), unit.margins(scores[1])
    return PairFacts(*known["reference"].unbind(1), chosen - rejected, ds, *betas, *labels.unbind(1))


def pair_losses(policy, batch, facts, multiplier, args, reference=None):
    """Terms of a packed batch, and METRICS and their counts {name: (B,)}.

    facts: of its pairs; reference: its states, where there is a KL to it.
    """
    policy_chosen_logps, policy_rejected_logps, *kl = policy.packed_logps(batch, reference)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, facts.ref_chosen_logps, facts.ref_rejected_logps
    chosen_lengths, rejected_lengths = batch.response_lengths.chunk(2)
    h = policy_chosen_logps - facts.ref_chosen_logps - (policy_rejected_logps - facts.ref_rejected_logps)
    loss_H = soft_label_loss(facts.beta_H * h, (1 + facts.helpful) / 2)  # dpo_loss in the label's own direction
    loss_S = soft_label_loss(facts.beta_S * h, (1 + facts.harmless) / 2)
    margins = facts.helpful_margin, facts.harmless_margin
    joint = joint_loss(args.combine, h, facts.beta_H, *margins, facts.helpful, multiplier)
    kl = sum(kl) if kl else torch.zeros_like(h)
    nll, other_nll = nll_loss(policy_chosen_logps, chosen_lengths), nll_loss(policy_rejected_logps, rejected_lengths)
    if args.nll_coeff:
        joint = joint + args.nll_coeff * nll
        loss_H = loss_H + args.nll_coeff * torch.where(facts.helpful < 0, other_nll, nll)
        loss_S = loss_S + args.nll_coeff * torch.where(facts.harmless < 0, other_nll, nll)
    in_H, in_S = facts.helpful.abs(), facts.harmless.abs()  # 1 where a pair has the label
    terms = Terms(in_H * loss_H, in_S * loss_S, joint, kl)
    metrics = {
        "loss_H": terms.loss_H,
        "accuracy_H": (facts.helpful * h) > 0,
        "beta_H": in_H * facts.beta_H,
        "loss_S": terms.loss_S,
        "accuracy_S": (facts.harmless * h) > 0,
        "beta_S": in_S * facts.beta_S,
        "KL": kl,
        "nll_loss": nll,
        "helpful_rows": in_H,
        "harmless_rows": in_S,
        "tokens": (chosen_lengths + rejected_lengths) * (reference is not None),
    }
    return terms, metrics | pair_metrics(*policy_and_ref, args.beta)


def update_loss(terms, multiplier, counts, args):
    """What some pairs add to the loss of an update: their Terms, and the counts {name: number} of the whole update.

    Each term is divided by its own count over all passes and ranks: any split is the same gradient.
    """
    if args.combine == "additive":
        helpful = terms.loss_H.sum() / max(1, counts["helpful_rows"])
        harmless = multiplier * terms.loss_S.sum() / max(1, counts["harmless_rows"])
        loss = (helpful + harmless) / (1 + multiplier)
    else:
        loss = terms.joint.sum() / counts["pairs"]
    return loss + args.kl_coeff * terms.kl.sum() / counts["tokens"] if args.kl_coeff else loss


@torch.no_grad()
def reference_states(reference, batch):
    """What the KL compares with: the reference is the policy with its adapter off, or a model of its own."""
    with lora.use_adapter(reference, None):
        return reference.response_states(batch)


def reward_folders(args):
    """{task: folder} of the reward models whose scores have a part in the run."""
    judged = args.w or args.own_pairs or args.combine != "additive"
    needed = {"helpful": judged, "harmless": args.lambda_init and (judged or args.lambda_lr)}
    return {task: getattr(args, f"{task}_rm_path") for task in TASKS if needed[task]}


def read_records(folders, tokenizer, args):
    """({task: reward_model.json}, CostUnit).  A unit or a threshold that cannot be is refused before anything loads."""
    trust = args.trust_remote_code
    records = {task: reward_models.read_record(folder, task, tokenizer, trust) for task, folder in folders.items()}
    if "harmless" not in records:
        return records, reward_models.CostUnit()
    reward_models.check_threshold(args, records["harmless"])
    return records, reward_models.cost_unit(records, folders, args)


def read_both(run, tokenizer):
    """(pairs of both files, labels (N, 2) of PairFacts, places to train on, places held out)."""
    args, pairs, labels, places = run.args, [], [], {}
    for part, limit in (("train", args.num_samples), ("val", args.eval_samples or 0)):
        both = {task: [] for task in TASKS}
        for task in TASKS if args.lambda_init else TASKS[:1]:  # without a constraint no harmless file is needed
            if part == "train" or args.eval_samples != 0:
                both[task], report = run.read(getattr(args, f"{part}_{task}_path"), tokenizer, limit)
                run.say(*report, sep="\n")
        rows, directions = joined(both["helpful"], both["harmless"])
        places[part] = list(range(len(pairs), len(pairs) + len(rows)))
        pairs, labels = pairs + rows, labels + directions
    labels = torch.tensor(labels, dtype=torch.float32)
    counts = labels[places["train"]].abs().sum(0).tolist()
    counted = [f"{int(count):,} with a {task} label" for task, count in zip(TASKS, counts, strict=True)]
    run.say(f"{len(places['train']):,} pairs to train on, {', '.join(counted)}")
    return pairs, labels, places["train"], places["val"]


def load_judges(run, folders, records, policy):
    """{task: Frozen} of the reward models: adapters on the policy's base where they share it."""
    home, sha256 = (policy, base_sha256(policy)) if folders and not run.full else (None, None)
    seen, judges = run.data.example() | run.data.how_pictures_are_made(), {}
    for task, folder in folders.items():
        where = home, sha256, run.args, run.dtype, run.world.device
        judge = reward_models.load(folder, task, records[task], *where, **seen)
        run.say(judge.line)
        judges[task] = Frozen(judge.model, judge.adapter, judge.head)
    return judges


def update_counts(update, pairs, facts):
    """{count of METRICS: number} of an update, over all ranks."""
    labelled = [label[update.indices].abs().sum().item() for label in (facts.helpful, facts.harmless)]
    tokens = sum(len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in update.indices)
    return dict(zip(("helpful_rows", "harmless_rows"), labelled)) | {"tokens": tokens, "pairs": update.num_pairs}


def main(args):
    # 1 setup
    run = Run(args, __file__, TOY)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer, folders = run.load_tokenizer(), reward_folders(args)
    skeleton = run.skeleton(tokenizer)
    run.add_adapter(skeleton, "policy")  # a wrong target shows here
    if run.estimate_memory(skeleton, tokenizer, folders):
        return
    records, unit = read_records(folders, tokenizer, args)
    pairs, labels, train, held_out = read_both(run, tokenizer)
    validations = {f"{task} reward model": record.get("validation") for task, record in records.items()}
    data = run.plan(pairs, train, held_out, **validations)
    costly = [i for i in train if args.cost_prompts == "all" or labels[i, 1]]  # whose prompts E[cost] is over

    # 3 models: policy, reference and reward models are one frozen base where they share it
    policy = reference = run.load(args.model)
    asks_reference = args.kl_coeff or args.own_pairs  # in training too
    if args.ref_model_path or (asks_reference and run.full):  # else the policy before its first update
        reference = run.load(args.ref_model_path or args.model)
        prepare_model(reference)
    frozen = {"reference": Frozen(reference)} | load_judges(run, folders, records, policy)
    parameters = run.add_adapter(policy, "policy")
    run.prepare(policy)
    sampled = {"tokens of a sampled response": args.max_length - args.max_prompt_length}  # the data does not say it
    parameters = run.begin(policy, parameters, frozen, **sampled)
    needed = dict.fromkeys(frozen, data.needed)
    if args.cost_estimate == "snis":  # nothing is sampled: E[cost] before training is of all pairs
        needed["harmless"] = sorted({*data.needed, *costly})
    known = {role: run.cached(role, frozen[role], needed=needed[role]) for role in frozen}  # (N, 2) each
    facts = pair_facts(known, labels, data.needed, unit, args)
    asked = {"harmless": args.cost_estimate == "policy", "helpful": args.own_pairs, "reference": args.own_pairs}
    for role in [role for role in frozen if not asked[role]]:  # the others leave memory
        if frozen.pop(role).model is policy and role in TASKS:
            lora.remove_adapter(policy, role)
    reference = reference if asks_reference or (reference is policy and not run.full) else None
    forget()

    # 4 train
    scores, judge = known.get("harmless", torch.zeros(len(pairs), 2)), frozen.pop("harmless", None)
    constraint = Constraint(run, policy, tokenizer, judge, unit, scores, costly)
    multiplier = constraint.multiplier
    training = Training(run, policy, parameters, METRICS, "policy model", tensors={"samples": constraint.samples})
    own = OwnPairs(run, training, frozen, unit) if args.own_pairs else None
    facts = PairFacts(*(torch.cat((fact, torch.zeros(own.room if own else 0))) for fact in facts))

    def learn_from_own(places, known, own_labels):
        for fact, values in zip(facts, pair_facts(known, own_labels, slice(None), unit, args), strict=True):
            fact[places] = values

    def forward(indices, with_kl):
        """Terms and metrics of the pairs at these places."""
        batch, known_of_pairs = data.batch(indices), of_pairs(facts, indices, run.world.device)
        with run.autocast:
            states = reference_states(reference, batch) if with_kl else None
            return pair_losses(policy, batch, known_of_pairs, multiplier.value, args, states)

    def evaluate():
        with training.evaluation() as evaluation:
            for indices in evaluation.passes:
                evaluation.add(forward(indices, with_kl=reference is not None)[1])
        training.log_held_out(evaluation.means(), HELD_OUT)

    if run.checkpoint:
        constraint.restore(training)
        if own:
            learn_from_own(*own.restore())
    else:
        if "harmless" in known:
            constraint.start(records["harmless"])
        if own:
            learn_from_own(*own.add(constraint.draw, multiplier.value))
        if held_out:
            evaluate()
    for update in training.updates():
        if own:
            update = training.instead(own.mixed_into(update))
        counts = update_counts(update, data.pairs, facts)
        for indices in update.passes:
            terms, metrics = forward(indices, with_kl=args.kl_coeff > 0)
            training.backward(update_loss(terms, multiplier.value, counts, args), metrics)
            constraint.see(indices, metrics)
        if update.logs and reference and not args.kl_coeff:  # the KL of the last pass, to be seen
            with training.evaluation():  # without dropout: what is logged draws nothing
                metrics = forward(indices, with_kl=True)[1]
            training.add({"KL": metrics["KL"], "tokens": metrics["tokens"]})
        training.all_reduce_gradients()
        training.step()
        if "harmless" in known:
            constraint.update(update.number)
            if own and constraint.draw:
                learn_from_own(*own.add(constraint.draw, multiplier.value))
            training.log_file.write_lambda(update.number, constraint.at_a_glance())
        if update.logs:
            metrics = training.means() | constraint.metrics()
            training.log(metrics, SHOWN)
            training.warn(displacement(metrics), about="fall")
            training.warn(constraint.at_cap(), about="cap")
        if update.evaluates:
            evaluate()
        if update.ends_epoch:
            run.save_epoch(training, policy, tokenizer)
        constraint.keep(training)
        training.save_if_due()

    # 5 save
    distributed.assert_same_on_all_ranks([torch.tensor([multiplier.value], device=run.world.device)], run.world)
    run.save_policy(training, policy, tokenizer, "Safe-MM-DPO")


if __name__ == "__main__":
    endings.run(main, ARGS)
