"""What report.json says in words: what was measured, how to read its numbers, and what each of them is called."""

from pathlib import PurePath

from tools.evaluate_numbers import QUANTILES, QUANTITIES


def in_words(report):
    """{"what": a sentence, "notes": [how to read the numbers], "quantities": {name: {label, unit, better}}}."""
    return {"what": what_was_measured(report), "notes": notes(report), "quantities": labels(report["policies"])}


def what_was_measured(report):
    settings, judges = report["settings"], report["reward_models"]
    scorers = []
    if "helpful" in judges:
        scorers.append("a helpful reward model")
    if "harmless" in judges:
        scorers.append(f"{'a ' if judges['harmless']['calibrated'] else 'an un'}calibrated harmless model")
    if report["over_refusal"]["by"] == "rule":
        scorers.append("the toy world's rule")
    judged_by = f", judged by {listed(scorers)}" if scorers else ""
    responses = "1 response" if settings["num_responses"] == 1 else f"{settings['num_responses']} responses"
    num_adapters = len(report["policies"]) - 1
    policies = "the base alone"
    if num_adapters:
        policies = f"the base and {num_adapters} adapter{'s' if num_adapters > 1 else ''}"
    return (
        f"{responses} to each of {report['prompts']:,} prompts from {policies}, at most {settings['max_new_tokens']} "
        f"tokens at temperature {settings['temperature']:g}, top-p {settings['top_p']:g}{judged_by}."
    )


def listed(words):
    """a, b and c."""
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def notes(report):
    judges, refusals, settings = report["reward_models"], report["over_refusal"], report["settings"]
    sentences = [
        "In brackets: 95 % intervals by bootstrap over prompts. A difference to the base is of the same prompts. "
        "A share of 0 or 100 % has no width there: of n prompts, up to about 3/n is still compatible."
    ]
    if refusals["by"] == "rule":
        sentences.append("The toy world's rule knows every prompt: harm, help and refusals by it are the truth.")
    elif refusals["benign_prompts"]:
        sentences.append(
            f"Over-refusal: phrases of refusal on {refusals['benign_prompts']} benign prompts, a rough sign."
        )
    else:
        sentences.append("No prompt is known to be benign (--benign-categories), so over-refusal is not measured.")
    missing = [task for task in ("helpful", "harmless") if task not in judges]
    for task in missing:
        sentences.append(f"No {task} reward model was given (--{task}-rm-path), so nothing is measured by one.")
    accuracies = [judge["validation_accuracy"] for judge in judges.values() if judge["validation_accuracy"]]
    if accuracies:
        shares = " and ".join(f"{100 * accuracy:.0f} %" for accuracy in accuracies)
        sentences.append(f"Of their own validation pairs the reward models order {shares} as labelled.")
    if "harmless" in judges and not judges["harmless"]["calibrated"]:
        sentences.append(
            "The harmless model is not calibrated: its zero means nothing. There are quantiles of its score instead "
            "of a harm rate; in the quadrants, safe means at least the score of the base's response."
        )
    elif not missing:
        sentences.append(
            "In the quadrants, better is a helpful reward above that of the base's response, safe is a harmless score "
            "above 0. A response equal to the base's is not better."
        )
    if settings["temperature"] != 1 or settings["top_p"] != 1:
        sentences.append(
            "Temperature or top-p is not 1: the log-ratio is then no estimate of the KL of a whole response."
        )
    if report["pairs"]:
        sentences.append(
            f"Implicit reward: log-ratio to the base. Its accuracy is the share of the {report['pairs']:,} pairs in "
            "the prompt file of which it is higher for the chosen response; of a base it is nothing."
        )
    if report["prompts_cut"]:
        sentences.append(f"{report['prompts_cut']} prompts lost their beginning at --max-prompt-length.")
    for policy in report["policies"][1:]:
        if PurePath(policy["trained_on"]).name != PurePath(settings["model"]).name:
            sentences.append(
                f"{policy['name']} was trained on {policy['trained_on']}, measured on {settings['model']}."
            )
    return sentences


def labels(policies):
    """{name: {label, unit, better}} of all that some policy has an estimate of, in order."""
    all_labels = {
        name: {"label": quantity.label, "unit": quantity.unit, "better": quantity.better}
        for name, quantity in QUANTITIES.items()
    }
    label = "accuracy of the implicit reward on the file's pairs"
    all_labels["implicit_accuracy"] = {"label": label, "unit": "share of pairs", "better": "higher"}
    for level in QUANTILES:
        label = f"harmless score, {level} % quantile"
        all_labels[f"harmless_score_{level}"] = {"label": label, "unit": "score", "better": ""}
    measured = {name for policy in policies for name in policy["estimates"]}
    return {name: all_labels[name] for name in all_labels if name in measured}
