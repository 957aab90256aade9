"""E[cost] of the policy while it is trained: from responses sampled now, or from the pairs by importance weights.

policy   the mean cost of fresh responses, two to each of some prompts: unbiased for the policy as it is
snis     sum w c / sum w, w = pi/ref of the last responses of the pairs: no sampling, but consistent only where those
         responses were drawn from the reference, and worth as much as its effective sample size
"""

import math

import torch

import distributed
import lora
from packing import pack
from sampling import closed, end_tokens, gathered, sample

WINDOW = 512  # responses that importance weighting looks back on, over all ranks
LEAST_SAMPLES = 32  # effective ones, below which the estimate is not to be used


def prompts_of(pairs, eos):
    """[(ids, end)] of all different prompts: `end` closes a response, `eos` where a pair names no other."""
    ends = {tuple(pair.prompt_ids): eos if pair.end is None else pair.end for pair in pairs}
    return [(list(ids), end) for ids, end in ends.items()]


def draw(prompts, count, seed, rank, ranks):
    """This rank's share of `count` different prompts, drawn alike on all ranks."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed % 2**63))
    return [prompts[i] for i in order[:count].tolist()[rank::ranks]]


@torch.no_grad()
def sampled_cost(policy, judge, prompts, tokenizer, split, step, args, world):
    """E[cost] under the policy now: the mean over two responses to each of as many prompts as an update has pairs.

    prompts: of `prompts_of`.  A finished response is scored with the end that the harmless model was trained on.
    """
    count, room = args.batch_size * args.gradient_accumulation_steps, args.max_length - args.max_prompt_length
    seed = args.seed * 1_000_003 + step
    drawn = draw(prompts, count * world.size, seed, world.rank, world.size)
    asked, ends = [ids for ids, _ in drawn for _ in range(2)], end_tokens(policy, tokenizer)
    places = [2 * (world.rank + n // 2 * world.size) + n % 2 for n in range(len(asked))]  # among those of all ranks
    with gathered(policy):
        answers = sample(policy, tokenizer, asked, room, seed, places=places) if asked else []
    answers = [closed(answer, ends, drawn[n // 2][1]) for n, answer in enumerate(answers)]
    triples = list(zip(asked[::2], answers[::2], answers[1::2], strict=True))
    total = torch.zeros(2, dtype=torch.float64)  # of costs, of responses
    with lora.use_adapter(judge.model, judge.adapter):
        for indices in split(range(len(triples)), lengths=[sum(map(len, triple)) for triple in triples]):
            scores = judge.model.packed_scores(pack([triples[i] for i in indices], world.device), judge.head)
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
