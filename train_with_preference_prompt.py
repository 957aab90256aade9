"""Preference-guided DPO: move what a preference prompt does to a model into its weights, so that it is not needed.

    loss = -logsigmoid(beta h) + alpha relu(m_p - m) + lambda_kl KL(pi || ref)
    h    = log pi/ref(chosen | x) - log pi/ref(rejected | x)                    DPO, arXiv:2305.18290 Eq. 7
    m    = log pi(chosen | x) - log pi(rejected | x)
    m_p  = log pi(chosen | x, p) - log pi(rejected | x, p)                      no gradient; p the preference

The preference p is a text put into the prompt (--preference-text), or a soft prompt, vectors that learn_prompt.py made
(--use-prompt-embedding --prompt-embedding-path).  What is trained never sees it.  --teacher policy takes m_p from the
policy as it is, --teacher ref from the frozen reference: context distillation (arXiv:2112.00861) of a margin.
Both go beyond what the preference is worth; --stop-at-gap, alpha (m - m_p)^2 / 2 + lambda_kl KL, ends there.

Deviations from DPO's paper: the two terms behind it; AdamW instead of RMSprop.

    python train_with_preference_prompt.py --model toy --preference-text "Please answer politely and briefly." \\
        --batch-size 16 --gradient-accumulation-steps 1 --learning-rate 1e-3                    # laptop, offline
    python train_with_preference_prompt.py --dataset-path pairs.jsonl --preference-text "Answer politely."   # one GPU
    torchrun --nproc_per_node=4 train_with_preference_prompt.py --dataset-path pairs.jsonl \\
        --use-prompt-embedding --prompt-embedding-path outputs/soft_prompt                      # four GPUs

Copy with: formats/ harness/ distributed.py lora.py lora_targets.py losses.py packed_attention.py packed_model.py
    packed_probe.py packing.py preference_data.py preference_prompt.py toy_vision.py toy_world.py vision.py
"""

import math
from functools import partial
from typing import NamedTuple

from harness import endings, flags, training_flags

TOY = {"dataset_path": "train/polite_pairs.jsonl", "test_dataset_path": "test/polite_pairs.jsonl"}  # `toy`
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
    add("--stop-at-gap", action="store_true", help="pull m to the reference's m_p from both sides, without DPO's term")
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
    if args.stop_at_gap and (not args.alpha or (args.teacher == "policy" and "teacher" in args.given)):
        parser.error("--stop-at-gap is --alpha times a pull to the reference: leave --teacher policy and --alpha 0 out")
    args.teacher = "ref" if args.stop_at_gap else args.teacher
    training_flags.take_toy(args, *TOY)
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch

import lora
from harness.run import Frozen, Run, forget
from harness.score_cache import weights_sha256
from harness.training import Training
from losses import PAIR_METRICS, aligned_loss, displacement, dpo_loss, matched_loss, nll_loss, pair_metrics
from packed_model import prepare_model
from packing import of_pairs, pack
from preference_data import Pair, fingerprint
from preference_prompt import PromptError, check_room, read_soft_prompt, use_soft_prompt, with_text, with_vectors

OWN_METRICS = """loss_components/dpo_loss loss_components/aligned_loss preference_metrics/pref_delta_chosen
    preference_metrics/pref_delta_rejected preference_metrics/log_pref_advantage
    preference_metrics/pref_advantage_ratio preference_metrics/pref_gap preference_metrics/gap_closed""".split()
GAP, GAP_CLOSED, KL = "preference_metrics/pref_gap", "preference_metrics/gap_closed", "loss_components/kl_div"
METRICS = dict.fromkeys(["loss", *OWN_METRICS, *PAIR_METRICS, "nll_loss"], "pairs") | {KL: "tokens"}  # of responses
DOCUMENTED = {"loss/train": "loss", "rewards_train/accuracy": "rewards/accuracies"}
SHOWN = f"""loss loss_components/dpo_loss loss_components/aligned_loss {KL} rewards/accuracies rewards/margins
    logps/chosen preference_metrics/log_pref_advantage preference_metrics/pref_advantage_ratio {GAP_CLOSED}""".split()


class PairFacts(NamedTuple):
    """What the reference gives to chosen and rejected, (N,) each; NaN where nobody asks."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    prompted_chosen_logps: torch.Tensor  # behind the preference
    prompted_rejected_logps: torch.Tensor


def pair_losses(policy, batch, prompted, facts, args, reference=None):
    """Losses of a packed batch without the KL (B,); the KL, summed over each pair's response tokens (B,); and METRICS
    and their counts {name: (B,)}.

    prompted: the pairs behind the preference, packed, where the policy is the teacher, else None.  facts: PairFacts.
    reference: its states, where there is a KL.
    """
    policy_chosen_logps, policy_rejected_logps, *kl = policy.packed_logps(batch, reference)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, facts.chosen_logps, facts.rejected_logps
    margin, ref_margin = policy_chosen_logps - policy_rejected_logps, facts.chosen_logps - facts.rejected_logps
    teacher_chosen_logps, teacher_rejected_logps = facts.prompted_chosen_logps, facts.prompted_rejected_logps
    gap = teacher_chosen_logps - teacher_rejected_logps - ref_margin  # what the preference is worth to the reference
    if prompted:
        was_training = policy.training
        policy.eval()  # the teacher has no dropout
        with torch.no_grad():
            teacher_chosen_logps, teacher_rejected_logps = policy.packed_logps(prompted)
        policy.train(was_training)
    dpo, pull = dpo_loss(*policy_and_ref, args.beta)[0], matched_loss if args.stop_at_gap else aligned_loss
    aligned = pull(margin, teacher_chosen_logps - teacher_rejected_logps)
    losses = torch.zeros_like(dpo) if args.stop_at_gap else dpo
    chosen_lengths, rejected_lengths = batch.response_lengths.chunk(2)
    nll = nll_loss(policy_chosen_logps, chosen_lengths)
    if args.nll_coeff:
        losses = losses + args.nll_coeff * nll
    if args.alpha:
        losses = losses + args.alpha * aligned
    kl = sum(kl) if kl else torch.zeros_like(losses)
    chosen_delta = teacher_chosen_logps - policy_chosen_logps
    rejected_delta = teacher_rejected_logps - policy_rejected_logps
    advantage = chosen_delta - rejected_delta  # the mean of this is the one to trust: its exponential may overflow
    metrics = {
        "loss": losses,
        "loss_components/dpo_loss": dpo,
        "loss_components/aligned_loss": aligned,
        "preference_metrics/pref_delta_chosen": chosen_delta,
        "preference_metrics/pref_delta_rejected": rejected_delta,
        "preference_metrics/log_pref_advantage": advantage,
        "preference_metrics/pref_advantage_ratio": advantage.exp(),
        GAP: gap,
        GAP_CLOSED: margin - ref_margin,  # `completed` divides its mean by that of the gap
        "nll_loss": nll,
        KL: kl,
        "tokens": chosen_lengths + rejected_lengths,
    }
    return losses, kl, metrics | pair_metrics(*policy_and_ref, args.beta)


def completed(means, args):
    """Means of METRICS, and half their intervals, as the log has them, without those that nobody asked for.

    gap_closed becomes a share: of what the preference is worth to the reference, what the policy has without it.
    """
    means = means | {GAP_CLOSED: means[GAP_CLOSED] / means[GAP] if means[GAP] else math.nan}
    if args.lambda_kl:
        means["loss"] += args.lambda_kl * means[KL]
    unasked = {name for name in OWN_METRICS if math.isnan(means[name])} | ({KL} if not args.lambda_kl else set())
    no_interval = {"loss", GAP_CLOSED} | unasked  # not the one of what they are now
    without = unasked | {f"{name}_ci95" for name in no_interval}
    return {name: mean for name, mean in means.items() if name not in without}


@torch.no_grad()
def reference_states(reference, batch):
    """What the KL compares with: the reference is the policy with its adapter off, or a model of its own."""
    with lora.use_adapter(reference, None):
        return reference.response_states(batch)


def read_preference(skeleton, tokenizer, args, say):
    """(vectors (N, D) of the soft prompt, or None where the preference is a text; where in a prompt it goes)."""
    if not args.use_prompt_embedding:
        if (length := len(tokenizer(args.preference_text)["input_ids"])) > args.max_prompt_length:
            too_long = f"--preference-text has {length} tokens, beyond --max-prompt-length {args.max_prompt_length}"
            raise PromptError(f"{too_long}: say it in fewer words, or allow longer prompts")
        return None, args.preference_position or "system"
    width = skeleton.get_input_embeddings().weight.shape[1]
    vectors, trained_for = read_soft_prompt(args.prompt_embedding_path, width)
    position = args.preference_position or trained_for or "prefix"
    if trained_for not in (None, position):
        say(f"note: this soft prompt was trained for --preference-position {trained_for}, and is used {position}")
    say(f"soft prompt: {len(vectors)} vectors of width {width}, {position}, from {args.prompt_embedding_path}")
    return vectors, position


def behind_preference(pairs, vectors, position, tokenizer, say):
    """The pairs with the preference in their prompts: a text is there already, of vectors their places go in."""
    if vectors is None:
        prompted = [pair._replace(prompt_ids=pair.prompted_ids, pictures=pair.prompted_pictures) for pair in pairs]
    else:
        prompted = with_vectors(pairs, len(vectors), position)
    first = prompted[0].prompt_ids
    text = f"  {tokenizer.decode(first)!r}" if vectors is None else ""
    say(f"  row 0 prompt   {len(first):4} tokens with the preference{text}")
    return [Pair(*pair[:3], pictures=pair.pictures) for pair in prompted]


def main(args):
    # 1 setup
    run = Run(args, __file__, TOY)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = run.load_tokenizer()
    skeleton = run.skeleton(tokenizer)
    run.add_adapter(skeleton, "policy")  # a wrong target shows here
    if run.estimate_memory(skeleton, tokenizer):
        return
    vectors, position = read_preference(skeleton, tokenizer, args, run.say)
    prefer = partial(with_text, text=args.preference_text, position=position) if vectors is None else None
    pairs, train, held_out = run.read_pairs(args.dataset_path, args.test_dataset_path, tokenizer, prefer)
    prompted_pairs = behind_preference(pairs, vectors, position, tokenizer, run.say)
    check_room(skeleton.config, prompted_pairs, args.model)
    vectors_sha256 = "" if vectors is None else weights_sha256([("soft prompt", vectors)])
    preference = fingerprint(prompted_pairs) + vectors_sha256
    data = run.plan(pairs, train, held_out, preference=preference)

    # 3 models: the reference is the policy before its first update, or a model of its own
    policy = reference = run.load(args.model)
    parameters = run.add_adapter(policy, "policy")
    run.prepare(policy)
    if args.ref_model_path or (args.lambda_kl and run.full):
        reference = run.load(args.ref_model_path or args.model)
        prepare_model(reference)
    frozen = Frozen(reference)
    parameters = run.begin(policy, parameters, {"reference": frozen}, preference=preference)
    if vectors is not None:
        for model in {policy, reference}:
            use_soft_prompt(model, vectors.to(run.world.device))
    ref_logps = run.cached("reference", frozen)  # (N, 2): of chosen and rejected of each pair
    prompted_logps = torch.full_like(ref_logps, math.nan)
    asked = data.needed if args.alpha and args.teacher == "ref" else held_out
    if asked:
        prompted_logps = run.cached("prompted", frozen, prompted_pairs, asked, depends_on=vectors_sha256)
    facts = PairFacts(*ref_logps.unbind(1), *prompted_logps.unbind(1))
    frozen = model = None
    reference = reference if args.lambda_kl else None  # else nobody asks it again
    forget()

    # 4 train
    training = Training(run, policy, parameters, METRICS, "policy model")

    def forward(indices, ask_policy):
        """Losses (B,), KL (B,) and metrics of the pairs at these places; ask_policy: it is its own teacher."""
        batch, known = data.batch(indices), of_pairs(facts, indices, run.world.device)
        prompted = pack([prompted_pairs[i] for i in indices], run.world.device) if ask_policy else None
        with run.autocast:
            states = reference_states(reference, batch) if args.lambda_kl else None
            return pair_losses(policy, batch, prompted, known, args, states)

    def evaluate():
        with training.evaluation() as evaluation:
            for indices in evaluation.passes:
                evaluation.add(forward(indices, ask_policy=args.teacher == "policy")[2])
        training.log_held_out(completed(evaluation.means(), args), SHOWN)

    if held_out and not run.checkpoint:
        evaluate()
    for update in training.updates():
        num_tokens = sum(len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids) for i in update.indices)
        for indices in update.passes:
            losses, kl, metrics = forward(indices, ask_policy=args.alpha > 0 and args.teacher == "policy")
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            loss = losses.sum() / update.num_pairs
            if args.lambda_kl:
                loss = loss + args.lambda_kl * kl.sum() / num_tokens
            training.backward(loss, metrics)
        training.all_reduce_gradients()
        training.step()
        if update.logs:
            metrics = completed(training.means(), args)
            metrics |= {documented: metrics[name] for documented, name in DOCUMENTED.items()}
            training.log(metrics, [*SHOWN, "grad_norm"], beta=args.beta)
            training.warn(displacement(metrics), about="fall")
        if update.evaluates:
            evaluate()
        training.save_if_due()

    # 5 save
    run.save_policy(training, policy, tokenizer, "preference-guided DPO")


if __name__ == "__main__":
    endings.run(main, ARGS)
