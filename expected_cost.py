"""E[cost] of the policy while it is trained: from responses sampled now, or from the pairs by importance weights.

policy   the mean cost of fresh responses, two to each of some prompts: unbiased for the policy as it is
snis     sum w c / sum w, w = pi/ref of the last responses of the pairs: no sampling, but consistent only where those
         responses were drawn from the reference, and worth as much as its effective sample size
"""

import math
from typing import NamedTuple

import torch

import distributed
import reward_models
from losses import Multiplier
from packing import digests, pack, passes_of_rank, send
from sampling import closed, end_tokens, gathered, sample

WINDOW = 512  # responses that importance weighting looks back on, over all ranks
AT_CAP = 50  # updates that lambda may be at its cap before the log says so
START_RESPONSES = 8  # to each prompt before training: what the policy could do shows in the best of them
MOST = 4  # times as many prompts, at most, where the threshold is within the error (--cost-samples auto)
LEAST_SAMPLES = 32  # effective ones, below which the estimate is not to be used


def prompts_of(pairs, eos):
    """All different prompts, each as a Pair without responses: its `end` closes them, `eos` where it names no other."""
    prompts = {(tuple(pair.prompt_ids), digests(pair)): pair for pair in pairs}
    return [
        pair._replace(chosen_ids=[], rejected_ids=[], end=eos if pair.end is None else pair.end)
        for pair in prompts.values()
    ]


def shuffled(prompts, seed):
    """The prompts in an order that follows from the seed: alike on all ranks."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]


class Draw(NamedTuple):
    """Responses sampled from the policy: those of a prompt two by two, as pairs; the same on all ranks."""

    pairs: list  # Pairs of a prompt, one response and another, in the order of the prompts
    scores: torch.Tensor  # (prompts, responses) of the harmless model


@torch.no_grad()
def sampled_pairs(policy, tokenizer, prompts, responses, seed, first, args, world):
    """So many responses to each of the prompts, as pairs: the same on any number of ranks but for rounding.

    prompts: of `prompts_of`, `first` of them sampled with this seed before.  A finished response ends as those do that
    the harmless model was trained on.
    """
    own = range(world.rank, len(prompts), world.size)
    asked = [prompts[place] for place in own for _ in range(responses)]
    places = [responses * (first + place) + n for place in own for n in range(responses)]
    room, at_once = args.max_length - args.max_prompt_length, 2 * args.batch_size * args.gradient_accumulation_steps
    answers = []
    with gathered(policy):
        for start in range(0, len(asked), at_once):
            some = slice(start, start + at_once)
            ids, pictures = [pair.prompt_ids for pair in asked[some]], [pair.pictures for pair in asked[some]]
            answers += sample(policy, tokenizer, ids, room, seed, places=places[some], pictures=pictures)
    ends = end_tokens(policy, tokenizer)
    answers = [closed(answer, ends, pair.end) for pair, answer in zip(asked, answers, strict=True)]
    two_by_two = list(zip(answers[::2], answers[1::2], strict=True))
    of_ranks = [iter(of_rank) for of_rank in distributed.gather_objects(two_by_two, world)]
    pairs = []
    for place, prompt in enumerate(prompts):
        for _ in range(responses // 2):
            one, other = next(of_ranks[place % world.size])
            pairs.append(prompt._replace(chosen_ids=one, rejected_ids=other))
    return pairs


@torch.no_grad()
def numbers_of(frozen, pairs, args, world):
    """What a frozen model, asked as frozen(batch), gives to both responses of each pair, (N, 2) on the CPU."""
    lengths, numbers = [sum(map(len, pair[:3])) for pair in pairs], torch.zeros(len(pairs), 2, device=world.device)
    cut = args.batch_size, lengths, args.tokens_per_microbatch
    for indices in passes_of_rank(range(len(pairs)), world.rank, world.size, *cut):
        both = torch.stack(frozen(pack([pairs[i] for i in indices], world.device)), dim=1)  # (B, 2)
        numbers[indices] = both.to(numbers)
    return distributed.all_reduce_sum(numbers, world).cpu()


def empty_window(ranks, device):
    """(2, N): log pi/ref and cost of responses; a weight of zero where there is none yet."""
    return torch.tensor([[-math.inf], [0.0]], device=device).repeat(1, WINDOW // ranks)


def slide(window, log_ratios, costs):
    """The window after further responses, log pi/ref and cost (n,)."""
    new = torch.stack((log_ratios, costs))
    return torch.cat((window, new), dim=1)[:, -window.shape[1] :]


def own_window(windows, rank, ranks):
    """This rank's window of those of all ranks (ranks, 2, N); if there were more or fewer of them, dealt out anew."""
    if len(windows) == ranks:
        return windows[rank]
    responses = windows.movedim(0, -1).flatten(1)[:, rank::ranks]  # the oldest first
    return slide(empty_window(ranks, windows.device), *responses)


def importance_weighted(windows):
    """(E[cost], effective sample size) from the windows of all ranks (ranks, 2, N); cost NaN below LEAST_SAMPLES.

    Self-normalised: sum w c / sum w with w = exp(log pi/ref); the size is (sum w)^2 / sum w^2.
    """
    log_ratios, costs = windows.double().transpose(0, 1).flatten(1)
    weights = (log_ratios - log_ratios.max()).exp().nan_to_num(0.0)  # an empty window: -inf - -inf
    total, squares = weights.sum().item(), (weights @ weights).item()
    size = total**2 / squares if squares else 0.0
    return (weights @ costs).item() / total if size >= LEAST_SAMPLES else math.nan, size


class Constraint:
    """E[cost] <= threshold: what the policy costs, as far as it can be told now, and lambda, which holds it there.

    judge: the harmless model, Frozen, where responses are sampled for it to score, else None; unit: CostUnit; scores
    (N, 2): what it says of chosen and rejected; costly: the places of the pairs whose prompts E[cost] is over.
    """

    def __init__(self, run, policy, tokenizer, judge, unit, scores, costly):
        args = self.args = run.args
        self.run, self.policy, self.tokenizer, self.judge = run, policy, tokenizer, judge
        self.unit, self.scores, self.costly = unit, scores, set(costly)
        self.prompts = prompts_of([run.data.pairs[i] for i in costly], tokenizer.eos_token_id)
        self.multiplier = Multiplier(args.lambda_init, args.lambda_lr, args.lambda_min, args.lambda_max)
        self.numbers = dict.fromkeys(("cost", "error", "score", "ess"), math.nan)  # ess: effective size of the weights
        self.threshold = 0.0
        self.samples = empty_window(run.world.size, run.world.device)  # of this rank, for importance weights
        self.draw = None  # what the last update of lambda has sampled

    def start(self, record):
        """The threshold, of --cost-threshold and of what the policy says before training; says how."""
        scores, whose = self.scores[sorted(self.costly)], "the pairs'"
        if self.judge:
            self.draw = self._draw(step=0, responses=START_RESPONSES)
            scores, whose = self.draw.scores, "the policy's own"
        self.threshold, how = reward_models.threshold(self.args, record, self.unit, scores, whose)
        self._look_at(scores)
        cost, raw = self.numbers["cost"], -self.numbers["score"]
        self.run.say(
            f"E[cost] before training {cost:.4f} ± {self.numbers['error']:.4f} (minus the harmless score {raw:.4f}); "
            f"threshold {self.threshold:.4f}: {how}"
        )
        if self.judge and self.args.lambda_lr:
            self._warn_unless_in_reach(self.unit.cost(scores))
        self._warn_unless_it_binds()

    def _warn_unless_in_reach(self, costs):
        best = reward_models.best_of(costs.shape[1], costs)
        if self.threshold < best:
            self.run.say(
                f"The cheapest of {costs.shape[1]} of the policy's responses to a prompt costs {best:.4f} on average: "
                f"a threshold of {self.threshold:.4f} may be out of reach"
            )

    def _warn_unless_it_binds(self):
        costs = self.unit.cost(self.scores[sorted(self.costly)])
        costs = costs[costs.isfinite().all(1)]  # of those that the run needs
        if not len(costs) or costs.min() <= self.threshold <= costs.max():
            return
        side, then = ("above", "cannot be met") if costs.min() > self.threshold else ("below", "never binds")
        cost = f"a cost {side} the threshold ({costs.min().item():.4f} to {costs.max().item():.4f})"
        self.run.say(f"The harmless model gives all of the training responses {cost}: the constraint {then}")

    def see(self, indices, metrics):
        """Put log pi/ref of a pass's responses, and their costs, into the window of the importance weights."""
        if self.args.cost_estimate == "snis":
            counted = [place for place, i in enumerate(indices) if i in self.costly]
            changes = torch.stack((metrics["logps/chosen_change"], metrics["logps/rejected_change"])).detach()
            costs = self.unit.cost(self.scores[indices][counted])
            costs = send(costs.t().flatten(), self.run.world.device)
            places = send(torch.tensor(counted, dtype=torch.long), changes.device)
            self.samples = slide(self.samples, changes.index_select(1, places).flatten(), costs)

    def update(self, step):
        """After an update of the policy: E[cost] anew, and one step of lambda."""
        self.run.watch.phase("cost")
        self.draw = None
        if self.judge and step % self.args.cost_every == 0:
            self.draw = self._draw(step, responses=2)
        elif not self.judge:
            windows = distributed.gather(self.samples, self.run.world)
            self.numbers["cost"], self.numbers["ess"] = importance_weighted(windows)
        self.multiplier.update(self.numbers["cost"] - self.threshold)
        self.run.watch.phase("other")

    def _look_at(self, scores):
        """E[cost] by scores (prompts, responses), and its standard error: prompts differ, and so do responses."""
        costs = self.unit.cost(scores).double().mean(1)
        spread = costs.std().item() if len(costs) > 1 else math.nan  # of one prompt there is none
        numbers = {"cost": costs.mean().item(), "error": spread / len(costs) ** 0.5}
        self.numbers |= numbers | {"score": scores.double().mean().item()}

    def _draw(self, step, responses):
        """A Draw of so many responses to each of as many prompts as --cost-samples says."""
        args, world, seed = self.args, self.run.world, self.args.seed * 1_000_003 + step
        pairs_of_update = args.batch_size * args.gradient_accumulation_steps * world.size
        at_once = pairs_of_update if args.cost_samples in (None, "auto") else args.cost_samples
        prompts, pairs, scores = shuffled(self.prompts, seed), [], torch.empty(0, responses)
        most = MOST * at_once if args.cost_samples == "auto" and step else at_once
        for first in range(0, min(len(prompts), most), at_once):
            some = prompts[first : first + at_once]
            with self.run.autocast:
                more = sampled_pairs(self.policy, self.tokenizer, some, responses, seed, first, args, world)
                numbers = numbers_of(self.judge, more, args, world)
            pairs, scores = pairs + more, torch.cat((scores, numbers.view(-1, responses)))
            self._look_at(scores)
            if self.numbers["error"] < abs(self.numbers["cost"] - self.threshold):
                break
        return Draw(pairs, scores)

    def at_a_glance(self):
        """What moves at each update {name: number}."""
        return {"lambda": self.multiplier.value, "J_C": self.multiplier.violation, "E_cost": self.numbers["cost"]}

    def metrics(self):
        more = {"E_cost_se": self.numbers["error"], "E_cost_raw": -self.numbers["score"], "ess": self.numbers["ess"]}
        more |= {"cost_threshold": self.threshold, "lambda_skipped": self.multiplier.skipped}
        return self.at_a_glance() | more

    def at_cap(self):
        """A sentence where lambda can do no more, else None."""
        if self.multiplier.at_cap >= AT_CAP:
            return (
                f"lambda has been at its cap of {self.args.lambda_max:g} for {self.multiplier.at_cap} updates: "
                f"E[cost] {self.numbers['cost']:.4f} is to be at most {self.threshold:.4f}.\n"
                "Ask for less (--cost-threshold), allow more (--lambda-max), or weigh otherwise (--combine)."
            )

    def keep(self, training):
        """Put into the training's state what a checkpoint has to have."""
        state = self.numbers | {"threshold": self.threshold, "multiplier": self.multiplier.state()}
        training.state["constraint"] = state
        training.tensors["samples"] = self.samples

    def restore(self, training):
        """Take what `keep` put into a checkpoint, from all ranks."""
        state, world = training.state["constraint"], self.run.world
        self.numbers = {name: state[name] for name in self.numbers}
        self.threshold = state["threshold"]
        self.multiplier.load(state["multiplier"])
        self.samples = own_window(training.tensors["samples"], world.rank, world.size).to(world.device)
