"""The rows that go out: each prompt with the responses to it, all of them, or best against worst as a pair."""

from typing import NamedTuple

from packing import passes


class Rows(NamedTuple):
    """What a batch of prompts gives."""

    rows: list
    num_ties: int  # prompts without a best and a worst response
    num_below: int  # responses with a reward below --min-reward


def rows_of(prompts, texts, rewards, args):
    """The Rows of prompts [Prompt] and of --num-responses texts for each, with as many rewards, or none at all."""
    rows, num_ties = [], 0
    texts_of_prompts = passes(texts, args.num_responses)
    rewards_of_prompts = passes(rewards, args.num_responses) if rewards else [[] for _ in prompts]
    for prompt, its_texts, its_rewards in zip(prompts, texts_of_prompts, rewards_of_prompts, strict=True):
        if not args.pairs:
            rows += response_rows(prompt, its_texts, its_rewards)
        elif pair := pair_row(prompt, its_texts, its_rewards):
            rows.append(pair)
        else:
            num_ties += 1
    kept = rows if args.min_reward is None else [row for row in rows if row["reward"] >= args.min_reward]
    return Rows(kept, num_ties, len(rows) - len(kept))


def response_rows(prompt, texts, rewards):
    """A row for each response, with its reward where there are some."""
    rows = [{"prompt": prompt.prompt, "response": text} for text in texts]
    if rewards:
        rows = [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]
    return [row | prompt.fields for row in rows]


def pair_row(prompt, texts, rewards):
    """A row of preference_rows' shapes: best against worst response, messages where the prompt is; None for a tie."""
    places = best_and_worst(texts, rewards)
    if places is None:
        return None
    best, worst = places
    chosen, rejected = texts[best], texts[worst]
    if not isinstance(prompt.prompt, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    pair = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
    return pair | {"chosen_reward": rewards[best], "rejected_reward": rewards[worst]} | prompt.fields


def best_and_worst(texts, rewards):
    """Places of the responses with the highest and the lowest reward, the first of equals; None where these are equal
    in reward or in text.  An empty response is neither.
    """
    said = [place for place, text in enumerate(texts) if text.strip()]
    if not said:
        return None
    best, worst = max(said, key=rewards.__getitem__), min(said, key=rewards.__getitem__)
    return None if rewards[best] == rewards[worst] or texts[best] == texts[worst] else (best, worst)


# -- what was written so far -----------------------------------------------------------------------------------------

COUNTS = "prompts responses tokens cut ties below rows reward_sum reward_squares".split()


def count(progress, rewards, **counts):
    """Add a batch to progress (a dict with COUNTS): its counts by name, and its rewards, where there are some, to the
    mean and spread of all so far."""
    for name, number in counts.items():
        progress[name] += number
    if rewards:
        progress["reward_sum"] += sum(rewards)
        progress["reward_squares"] += sum(reward**2 for reward in rewards)
        mean = progress["reward_sum"] / progress["responses"]
        variance = progress["reward_squares"] / progress["responses"] - mean**2
        progress |= {"rm_reward_mean": mean, "rm_reward_std": max(variance, 0) ** 0.5}


def in_words(progress, pairs):
    """The counts as a line of the log."""
    words = f"{progress['rows']:,} {'pairs' if pairs else 'rows'} of {progress['responses']:,} responses"
    words += f" to {progress['prompts']:,} prompts"
    labels = {"ties": "ties dropped", "below": "below --min-reward", "cut": "cut at --max-new-tokens"}
    words += "".join(f", {progress[name]:,} {label}" for name, label in labels.items() if progress[name])
    if "rm_reward_mean" in progress:
        words += f", rm_reward_mean={progress['rm_reward_mean']:.4f} rm_reward_std={progress['rm_reward_std']:.4f}"
    return words
