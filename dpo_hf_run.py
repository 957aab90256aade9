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
    packed_probe.py packing.py preference_data.py toy_vision.py toy_world.py vision.py
"""

from harness import endings, flags, toys, training_flags

TOY = {"dataset": "train/helpful_pairs.jsonl", "eval_dataset": "test/helpful_pairs.jsonl"}  # what `toy` stands for


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
    if args.dataset in toys.FOLDERS and not args.eval_dataset:
        args.eval_dataset = args.dataset
    if args.label_smoothing and args.loss not in ("sigmoid", "robust"):
        parser.error(f"--label-smoothing has no effect on --loss {args.loss}: use sigmoid or robust")
    lora_flags = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"} & args.typed
    if args.adapter and lora_flags:
        parser.error(f"--{min(lora_flags).replace('_', '-')} has no effect with --adapter, which brings its own")
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import lora
from harness.run import Frozen, Run, forget
from harness.training import Training
from losses import PAIR_METRICS, displacement, dpo_loss, nll_loss, pair_metrics
from packed_model import prepare_model
from packing import send

METRICS = dict.fromkeys(["loss", *PAIR_METRICS, "nll_loss"], "pairs")  # all of them means over pairs
SHOWN = "loss beta rewards/accuracies rewards/margins logps/chosen logps/chosen_change grad_norm".split()
HELD_OUT = "loss rewards/accuracies rewards/margins logps/accuracies logps/chosen".split()


def pair_losses(policy, batch, ref_logps, args):
    """DPO losses of a packed batch (B,), and its METRICS {name: (B,)}.

    ref_logps (B, 2): what the reference gives to chosen and rejected.
    """
    policy_chosen_logps, policy_rejected_logps = policy.packed_logps(batch)
    policy_and_ref = policy_chosen_logps, policy_rejected_logps, *ref_logps.unbind(1)
    chosen_lengths, rejected_lengths = batch.response_lengths.chunk(2)
    losses = dpo_loss(*policy_and_ref, args.beta, args.loss, args.label_smoothing, chosen_lengths, rejected_lengths)[0]
    nll_losses = nll_loss(policy_chosen_logps, chosen_lengths)
    if args.nll_coeff:
        losses = losses + args.nll_coeff * nll_losses
    return losses, {"loss": losses, "nll_loss": nll_losses} | pair_metrics(*policy_and_ref, args.beta)


def add_adapters(policy, run):
    """Give the policy its LoRA adapter (with --adapter also the frozen copy that is the reference); what to train."""
    if not run.args.adapter:
        return run.add_adapter(policy, "policy")
    lora.load_adapter(policy, run.args.adapter, "ref")
    return lora.load_adapter(policy, run.args.adapter, "policy", trainable=True)


def main(args):
    # 1 setup
    run = Run(args, __file__, TOY)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = run.load_tokenizer()
    skeleton = run.skeleton(tokenizer)
    add_adapters(skeleton, run)  # a wrong adapter or target shows here
    if run.estimate_memory(skeleton, tokenizer):
        return
    pairs, train, held_out = run.read_pairs(args.dataset, args.eval_dataset, tokenizer)
    data = run.plan(pairs, train, held_out)

    # 3 models: the reference is the policy before its first update, or a model of its own
    policy = run.load(args.model)
    parameters = add_adapters(policy, run)
    run.prepare(policy)
    reference = Frozen(policy, "ref" if args.adapter else None)
    if args.ref_model_path:
        reference = Frozen(run.load(args.ref_model_path))
        prepare_model(reference.model)
    parameters = run.begin(policy, parameters, {"reference": reference})
    ref_logps = run.cached("reference", reference)  # (N, 2): of chosen and rejected of each pair
    reference = None  # nobody asks it again
    forget()

    # 4 train
    training = Training(run, policy, parameters, METRICS, "policy model")

    def forward(indices):
        """Losses (B,) and metrics of the pairs at these places."""
        with run.autocast:
            return pair_losses(policy, data.batch(indices), send(ref_logps[indices], run.world.device), args)

    def evaluate():
        with training.evaluation() as evaluation:
            for indices in evaluation.passes:
                evaluation.add(forward(indices)[1])
        training.log_held_out(evaluation.means(), HELD_OUT)

    if held_out and not run.checkpoint:
        evaluate()
    for update in training.updates():
        for indices in update.passes:
            losses, metrics = forward(indices)
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            training.backward(losses.sum() / update.num_pairs, metrics)
        training.all_reduce_gradients()
        training.step()
        if update.logs:
            metrics = training.means()
            training.log(metrics, SHOWN, beta=args.beta)
            training.warn(displacement(metrics), about="fall")
        if update.evaluates:
            evaluate()
        training.save_if_due()

    # 5 save
    run.save_policy(training, policy, tokenizer, "DPO")


if __name__ == "__main__":
    endings.run(main, ARGS)
