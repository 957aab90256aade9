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
    packed_probe.py packing.py preference_data.py preference_prompt.py toy_vision.py toy_world.py vision.py
"""

from harness import endings, flags, training_flags

TOY = {"dataset_path": "train/polite_pairs.jsonl", "test_dataset_path": "test/polite_pairs.jsonl"}  # `toy`


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
    training_flags.take_toy(args, *TOY)
    return args


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds: --help and a wrong flag are answered at once

import torch

from formats.model_files import check_positions
from harness.run import Frozen, Run
from harness.training import Training
from losses import PAIR_METRICS, dpo_loss, pair_metrics
from packing import send
from preference_prompt import PromptError, save_soft_prompt, use_soft_prompt, with_vectors

METRICS = dict.fromkeys(["loss", *PAIR_METRICS], "pairs")  # all of them means over pairs
SHOWN = "loss beta rewards/accuracies rewards/margins logps/chosen logps/chosen_change grad_norm".split()
HELD_OUT = "loss rewards/accuracies rewards/margins logps/accuracies logps/chosen".split()


def pair_losses(model, batch, ref_logps, args):
    """Losses of a packed batch with the vectors in it (B,), and its METRICS {name: (B,)}.

    ref_logps (B, 2): what the model gives to chosen and rejected without them.
    """
    prompted_and_plain = *model.packed_logps(batch), *ref_logps.unbind(1)
    losses = dpo_loss(*prompted_and_plain, args.beta)[0]
    return losses, {"loss": losses} | pair_metrics(*prompted_and_plain, args.beta)


def number_of_vectors(tokenizer, args):
    """As many as were asked for; else 20, or of a text its tokens."""
    if args.prompt_init != "text":
        return args.num_virtual_tokens or 20
    ids = tokenizer(args.preference_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PromptError(f"--preference-text {args.preference_text!r} has no tokens: say something")
    return args.num_virtual_tokens or len(ids)


def first_vectors(model, tokenizer, num_vectors, args):
    """The vectors (N, D) fp32 that training starts from, as the embedding layer returns them (Gemma's are scaled)."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.prompt_init == "text":
        of_text = tokenizer(args.preference_text, add_special_tokens=False)["input_ids"]
        ids = [of_text[place % len(of_text)] for place in range(num_vectors)]
    else:
        ids = torch.randint(len(tokenizer), (num_vectors,), generator=generator).tolist()
    vectors = model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float()
    if args.prompt_init == "random":  # noise of the size of embeddings
        vectors = torch.randn(vectors.shape, generator=generator).to(model.device) * vectors.std()
    return vectors.detach()


def main(args):
    # 1 setup
    run = Run(args, __file__, TOY)

    # 2 data (before the models: a mistake in it should not wait for gigabytes of weights)
    tokenizer = run.load_tokenizer()
    skeleton = run.skeleton(tokenizer)
    num_vectors = number_of_vectors(tokenizer, args)
    longest = f"--max-length {args.max_length} with {num_vectors} vectors"
    check_positions(skeleton.config, args.max_length + num_vectors, longest, args.model)
    if run.estimate_memory(skeleton, tokenizer, vectors=num_vectors):
        return
    pairs, train, held_out = run.read_pairs(args.dataset_path, args.test_dataset_path, tokenizer)
    prompted_pairs = with_vectors(pairs, num_vectors, args.preference_position)
    data = run.plan(pairs, train, held_out)

    # 3 models: the frozen model without the vectors is the reference
    model = run.load(args.model).requires_grad_(False)
    run.prepare(model)
    reference = Frozen(model)
    run.begin(model, [], {"reference": reference})
    ref_logps = run.cached("reference", reference)  # (N, 2): of chosen and rejected of each pair
    vectors = torch.nn.Parameter(first_vectors(model, tokenizer, num_vectors, args))  # (N, D) fp32
    use_soft_prompt(model, vectors)
    data.pairs = prompted_pairs

    # 4 train
    training = Training(run, model, [vectors], METRICS, "soft prompt")

    def forward(indices):
        """Losses (B,) and metrics of the pairs at these places."""
        return pair_losses(model, data.batch(indices), send(ref_logps[indices], run.world.device), args)

    def evaluate():
        with training.evaluation() as evaluation:
            for indices in evaluation.passes:
                evaluation.add(forward(indices)[1])
        training.log_held_out(evaluation.means(), HELD_OUT)

    if held_out and not run.checkpoint:
        evaluate()
    for update in training.updates():
        for indices in filter(None, update.passes):  # a pass without pairs has no vectors to train
            losses, metrics = forward(indices)
            # Divided by the pairs of the whole update: any split into passes and ranks is the same gradient.
            training.backward(losses.sum() / update.num_pairs, metrics)
        training.all_reduce_gradients()
        training.step()
        if update.logs:
            training.log(training.means(), SHOWN, beta=args.beta)
        if update.evaluates:
            evaluate()
        training.save_if_due()

    # 5 save
    with run.saving(training, model, "prompt tuning") as folder:
        if folder:
            save_soft_prompt(vectors, folder, args.model, args.preference_position)


if __name__ == "__main__":
    endings.run(main, ARGS)
