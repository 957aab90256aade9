"""E[cost] of the policy while it is trained: from responses sampled now, or from the pairs by importance weights.

policy   the mean cost of fresh responses, two to each of some prompts: unbiased for the policy as it is
snis     sum w c / sum w, w = pi/ref of the last responses of the pairs: no sampling, but consistent only where those
         responses were drawn from the reference, and worth as much as its effective sample size
"""

import math

import torch

import distributed
import reward_models
from losses import Multiplier
from packing import pack, passes, send
from sampling import closed, end_tokens, gathered, sample

WINDOW = 512  # responses that importance weighting looks back on, over all ranks
AT_CAP = 50  # updates that lambda may be at its cap before the log says so
LEAST_SAMPLES = 32  # effective ones, below which the estimate is not to be used


def prompts_of(pairs, eos):
    """[(ids, end)] of all different prompts: `end` closes a response, `eos` where a pair names no other."""
    ends = {tuple(pair.prompt_ids): eos if pair.end is None else pair.end for pair in pairs}
    return [(list(ids), end) for ids, end in ends.items()]


def draw(prompts, count, seed, rank, ranks):
    """This rank's share of `count` different prompts, drawn alike on all ranks."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed % 2**63))
    return [prompts[i] for i in order[:count].tolist()[rank::ranks]]


def place_of(n, rank, ranks):
    """Where this rank's n-th response stands among those of all ranks, two to a prompt."""
    prompt = rank + n // 2 * ranks
    return 2 * prompt + n % 2


@torch.no_grad()
def sampled_cost(policy, judge, prompts, tokenizer, step, args, world):
    """E[cost] under the policy now: the mean over two responses to each of as many prompts as an update has pairs.

    judge(batch): scores of the harmless model, (B,) and (B,).  prompts: of `prompts_of`.  A finished response is scored
    with the end that the harmless model was trained on.
    """
    count, room = args.batch_size * args.gradient_accumulation_steps, args.max_length - args.max_prompt_length
    seed = args.seed * 1_000_003 + step
    drawn = draw(prompts, count * world.size, seed, world.rank, world.size)
    asked = [ids for ids, _ in drawn for _ in range(2)]
    places = [place_of(n, world.rank, world.size) for n in range(len(asked))]
    with gathered(policy):
        answers = sample(policy, tokenizer, asked, room, seed, places=places) if asked else []
    ends = end_tokens(policy, tokenizer)
    answers = [closed(answer, ends, drawn[n // 2][1]) for n, answer in enumerate(answers)]
    triples = list(zip(asked[::2], answers[::2], answers[1::2], strict=True))
    lengths = [sum(map(len, triple)) for triple in triples]
    total = torch.zeros(2, dtype=torch.float64)  # of costs, of responses
    for indices in passes(range(len(triples)), args.batch_size, lengths, args.tokens_per_microbatch):
        scores = judge(pack([triples[i] for i in indices], world.device))
        total += torch.tensor([-torch.cat(scores).sum().item(), 2 * len(indices)])
    cost, responses = distributed.all_reduce_sum(total, world).tolist()
    return cost / responses


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

    judge: the harmless model, Frozen, where responses are sampled for it to score, else None; costs (N, 2): what it
    says of chosen and rejected, negated; costly: the places of the pairs whose prompts E[cost] is over.
    """

    def __init__(self, run, policy, tokenizer, judge, costs, costly):
        args = self.args = run.args
        self.run, self.policy, self.tokenizer, self.judge = run, policy, tokenizer, judge
        self.costs, self.costly = costs, set(costly)
        self.prompts = prompts_of([run.data.pairs[i] for i in costly], tokenizer.eos_token_id)
        self.multiplier = Multiplier(args.lambda_init, args.lambda_lr, args.lambda_min, args.lambda_max)
        self.cost, self.ess, self.threshold = math.nan, math.nan, 0.0  # ess: effective sample size of the weights
        self.samples = empty_window(run.world.size, run.world.device)  # of this rank, for importance weights

    def start(self, record):
        """The threshold, of --cost-threshold and of what the policy costs before training; says how."""
        if self.judge:  # an uncalibrated `auto` stands on it: from several draws
            draws = 4 if self.args.cost_threshold == "auto" and not record["calibrated"] else 1
            start_cost = self.cost = sum(self._sampled(step=-n) for n in range(draws)) / draws
        else:
            start_cost = self.costs[sorted(self.costly)].mean().item()  # of the pairs, where nothing is sampled
        self.threshold, how = reward_models.threshold(self.args.cost_threshold, record, start_cost)
        self.run.say(f"E[cost] before training {start_cost:.4f}; threshold {self.threshold:.4f}: {how}")
        self._warn_unless_it_binds()

    def _warn_unless_it_binds(self):
        costs = self.costs[sorted(self.costly)]
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
            costs = send(self.costs[indices][counted].t().flatten(), self.run.world.device)
            places = send(torch.tensor(counted, dtype=torch.long), changes.device)
            self.samples = slide(self.samples, changes.index_select(1, places).flatten(), costs)

    def update(self, step):
        """After an update of the policy: E[cost] anew, and one step of lambda."""
        self.run.watch.phase("cost")
        if self.judge and step % self.args.cost_every == 0:
            self.cost = self._sampled(step)
        elif not self.judge:
            self.cost, self.ess = importance_weighted(distributed.gather(self.samples, self.run.world))
        self.multiplier.update(self.cost - self.threshold)
        self.run.watch.phase("other")

    def _sampled(self, step):
        with self.run.autocast:
            world = self.run.world
            return sampled_cost(self.policy, self.judge, self.prompts, self.tokenizer, step, self.args, world)

    def at_a_glance(self):
        """What moves at each update {name: number}."""
        return {"lambda": self.multiplier.value, "J_C": self.multiplier.violation, "E_cost": self.cost}

    def metrics(self):
        more = {"ess": self.ess, "cost_threshold": self.threshold, "lambda_skipped": self.multiplier.skipped}
        return self.at_a_glance() | more

    def at_cap(self):
        """A sentence where lambda can do no more, else None."""
        if self.multiplier.at_cap >= AT_CAP:
            return (
                f"lambda has been at its cap of {self.args.lambda_max:g} for {self.multiplier.at_cap} updates: "
                f"E[cost] {self.cost:.4f} is to be at most {self.threshold:.4f}.\n"
                "Ask for less (--cost-threshold), allow more (--lambda-max), or weigh otherwise (--combine)."
            )

    def keep(self, training):
        """Put into the training's state what a checkpoint has to have."""
        numbers = {"cost": self.cost, "ess": self.ess, "threshold": self.threshold}
        training.state["constraint"] = numbers | {"multiplier": self.multiplier.state()}
        training.tensors["samples"] = self.samples

    def restore(self, training):
        """Take what `keep` put into a checkpoint, from all ranks."""
        state, world = training.state["constraint"], self.run.world
        self.cost, self.ess, self.threshold = state["cost"], state["ess"], state["threshold"]
        self.multiplier.load(state["multiplier"])
        self.samples = own_window(training.tensors["samples"], world.rank, world.size).to(world.device)
