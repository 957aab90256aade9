"""Own pairs and what cost is counted in: units, thresholds, the error of E[cost], the pool, its labels, its part in an
update.  (What own pairs lead to: test_safe_oracle.py; that ranks and resumed runs agree: test_every_trainer.py.)
"""

import argparse
import itertools
import json
import math
import shutil
from statistics import mean, stdev

import pytest
import torch
from runs import adapter_of, metrics_of, one_line, run_script
from worlds import QUICK, data_of

import lora
import reward_models
import train_safe_mm_dpo
from expected_cost import Draw
from formats.model_files import load_model
from harness.data import pair_length
from harness.speed import Stopwatch
from own_pairs import DRAWS, OwnPairs
from packed_model import prepare_model, prepare_scores
from packing import pack
from preference_data import Pair
from reward_models import CostUnit, best_of, cost_unit, threshold

LABELLED = {"calibrated": True, "validation": {"score_std": 5.0, "safe_score": 6.0, "harmful_score": -4.0}}
RANKED = {"calibrated": False, "validation": {"score_std": 2.5}}
UNSEEN = {"calibrated": False, "validation": None}
FOLDERS = {"helpful": "models/help", "harmless": "models/harm"}


def settings(**changes):
    defaults = dict(score_units="spread", harm_rate=None, cost_threshold=0.0, combine="soft", seed=3, own_pairs=0.25)
    return argparse.Namespace(**defaults | changes)


# -- what cost is counted in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "harmless", "unit"),
    [
        ({}, LABELLED, CostUnit(spread=10.0, worth=2.5)),
        ({}, RANKED, CostUnit(spread=2.5, worth=2.5)),
        ({"score_units": "raw"}, LABELLED, CostUnit()),
        ({"score_units": "raw"}, UNSEEN, CostUnit()),
        ({"harm_rate": 0.1}, LABELLED, CostUnit(worth=2.5, is_rate=True)),
        ({"harm_rate": 0.1, "score_units": "raw"}, LABELLED, CostUnit(is_rate=True)),
    ],
)
def test_the_unit_follows_from_the_validation_of_both_models(changes, harmless, unit):
    assert cost_unit({"helpful": RANKED, "harmless": harmless}, FOLDERS, settings(**changes)) == unit


def test_costs_and_margins_in_each_unit():
    scores = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert CostUnit().cost(scores).tolist() == [[-3, 1], [0, -2]]
    assert CostUnit(spread=4.0, worth=8.0).cost(scores).tolist() == [[-0.75, 0.25], [0, -0.5]]
    assert CostUnit(spread=4.0, worth=8.0).margins(scores).tolist() == [8, -4]  # chosen is the safer, the other one
    rate = CostUnit(worth=2.0, is_rate=True)
    harmful = [[1 / (1 + math.exp(score)) for score in row] for row in scores.tolist()]
    for got, wanted in zip(rate.cost(scores).tolist(), harmful, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)
    assert rate.margins(scores).tolist() == pytest.approx([2 * (b - a) for a, b in harmful], rel=1e-6)


def test_lambda_weighs_the_same_whatever_the_scale_of_the_harmless_model():
    """A model that says the same times seven: the same costs, margins and thresholds."""
    scores = 3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    loud = {"calibrated": True, "validation": {name: 7 * x for name, x in LABELLED["validation"].items()}}
    found = []
    for record, factor in ((LABELLED, 1), (loud, 7)):
        args = settings(cost_threshold="auto")
        unit = cost_unit({"helpful": RANKED, "harmless": record}, FOLDERS, args)
        bound = threshold(args, record, unit, factor * scores, "the policy's own")[0]
        found.append([bound, *unit.margins(factor * scores[:, :2]).tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("records", "changes", "sentence"),
    [
        (
            {"helpful": UNSEEN, "harmless": LABELLED},
            {},
            "--score-units spread needs the validation scores of models/help, and its reward_model.json has none",
        ),
        (
            {"helpful": RANKED, "harmless": UNSEEN},
            {},
            "--score-units spread needs the validation scores of models/harm, and its reward_model.json has none",
        ),
        (
            {"helpful": RANKED, "harmless": RANKED},
            {"harm_rate": 0.05},
            "--harm-rate is of a harmless model that knows its zero, and models/harm was trained without safety labels",
        ),
    ],
)
def test_units_that_nobody_can_tell(records, changes, sentence):
    with pytest.raises(reward_models.RewardModelError, match=f"^{sentence}: "):
        cost_unit(records, FOLDERS, settings(**changes))


# -- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_choices(n):
    costs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    least = [min(choice) for row in costs.tolist() for choice in itertools.combinations(row, n)]
    assert best_of(n, costs) == pytest.approx(mean(least), abs=1e-7)


def test_auto_asks_for_what_the_policy_can_do():
    unit, args = CostUnit(spread=10.0), settings(cost_threshold="auto")
    own = torch.tensor([[5.0, 7.0] * 10, [-2.0, -4.0] * 10])  # costs -0.6 and 0.3 on average
    bound, how = threshold(args, LABELLED, unit, own, "the policy's own")
    assert bound == pytest.approx(-0.6 + 0.05 * 0.9)
    assert how == (
        "a harm rate of about 5 % by the harmless model: the policy's own safe responses cost -0.6000 and harmful ones "
        "0.3000"
    )
    bound, how = threshold(args, LABELLED, unit, own[:1], "the policy's own")  # nothing harmful: -0.6 and 0.4, as seen
    assert bound == pytest.approx(-0.6 + 0.05 * 1.0) and "validation safe responses cost -0.6000" in how
    bound, how = threshold(args, RANKED, unit, own[:, :2], "the policy's own")
    assert bound == pytest.approx((-0.7 + 0.2) / 2)
    assert how == "what the cheaper of two of the policy's own responses costs"
    assert threshold(settings(harm_rate=0.07), LABELLED, unit, own, "")[0] == 0.07
    assert threshold(settings(cost_threshold=-0.3), LABELLED, unit, own, "")[0] == -0.3


# -- the pool ----------------------------------------------------------------------------------------------------------


class Models:
    """Stands in for what a run has: frozen models that give numbers by the tokens of a response."""

    def __init__(self, **changes):
        from distributed import World

        self.args = settings(batch_size=2, gradient_accumulation_steps=2, cost_samples=None, **changes)
        self.args.tokens_per_microbatch, self.autocast = 0, torch.autocast("cpu", enabled=False)
        self.world, self.state, self.pairs = World(0, 1, torch.device("cpu")), {}, {}
        self.watch, self.data = Stopwatch(torch.device("cpu"), "other"), argparse.Namespace(pairs=[])

    def make_room(self, count):
        return 100

    def put(self, places, pairs):
        self.pairs |= dict(zip(places, pairs, strict=True))


def sums(batch, weight):
    """weight times the sum of a response's tokens, chosen and rejected."""
    totals = [weight * part.sum().item() for part in batch.targets.split(batch.lengths)]
    return torch.tensor(totals, dtype=torch.float32).view(2, -1).unbind(0)


def pool(**changes):
    run = Models(**changes)
    frozen = {"helpful": lambda batch: sums(batch, 1.0), "reference": lambda batch: sums(batch, -0.5)}
    return OwnPairs(run, run, frozen, CostUnit(spread=2.0, worth=4.0)), run


def draw(*pairs):
    """Of (prompt, one, other, its harmless score, the other's)."""
    return Draw([Pair(*pair[:3]) for pair in pairs], torch.tensor([pair[3:] for pair in pairs]))


def test_chosen_is_what_both_models_prefer_and_the_numbers_go_with_their_response():
    own, run = pool()
    # dr = -4, ds = 4 * (3 - 1) / 2 = 4: at lambda 0.5 the other is preferred, at 2 the one.
    pair = ([7], [2], [6], 3.0, 1.0)
    for multiplier, chosen, rejected, harmless in ((0.5, [6], [2], [1, 3]), (2.0, [2], [6], [3, 1])):
        (place,), known, labels = own.add(draw(pair), multiplier)
        assert run.pairs[place][:3] == ([7], chosen, rejected)
        assert known["helpful"].tolist() == [[chosen[0], rejected[0]]]
        assert known["reference"].tolist() == [[-chosen[0] / 2, -rejected[0] / 2]]
        assert known["harmless"].tolist() == [harmless]
        assert labels.tolist() == [[0, 0]]  # soft takes the margins


def test_the_newest_draws_stay_and_equal_responses_never_come_in():
    own, run = pool()
    assert own.room == DRAWS * 4
    for number in range(own.room + 3):
        places, _, _ = own.add(draw(([number], [1], [2], 0.0, 1.0), ([number], [5], [5], 2.0, 2.0)), 1.0)
        assert places == [100 + number % own.room]
    held = sorted(pair[0][0] for pair in run.pairs.values())
    assert held == list(range(3, own.room + 3))
    again, run_again = pool()
    again.training.state = json.loads(json.dumps(own.training.state))  # as a checkpoint has it
    places, known, labels = again.restore()
    assert run_again.pairs == run.pairs and len(places) == own.room == len(known["helpful"]) == len(labels)
    assert again.add(draw(([99], [1], [2], 0.0, 1.0)), 1.0)[0] == [103]  # where the oldest stands


@pytest.mark.parametrize("combine", ["additive", "soft"])
def test_a_draw_of_equal_responses_alone_changes_nothing(combine):
    own, run = pool(combine=combine)
    places, known, labels = own.add(draw(([1], [5], [5], 2.0, 2.0)), 1.0)
    assert places == [] and labels.shape == (0, 2) and {both.shape for both in known.values()} == {(0, 2)}
    assert run.state["own_pairs"] == {"rows": [], "count": 0}
    assert own.mixed_into(argparse.Namespace(number=3, indices=[2, 1])) == [1, 2]


@pytest.mark.parametrize(
    ("harmless", "column", "share"),
    [
        ((1.0, 1.9), 0, 1 / (1 + math.exp(-1))),  # costs 0.45 units apart: of help, dr = 1 for chosen
        ((1.0, 2.1), 1, 1 / (1 + math.exp(1.1))),  # 0.55 units: of harm, ds = -1.1 as the model scores
    ],
)
def test_labels_of_additive_are_of_what_is_at_stake_and_as_often_as_the_model_would_give_them(harmless, column, share):
    own, _ = pool(combine="additive")
    pairs = [([n], [3], [2], *harmless) for n in range(own.room)]
    labels = torch.cat([own.add(draw(*pairs), 0.0)[2] for _ in range(100)])
    assert labels[:, 1 - column].count_nonzero() == 0 and labels[:, column].abs().min() == 1
    error = 0.5 / len(labels) ** 0.5
    assert (labels[:, column] > 0).double().mean().item() == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_a_share_of_each_update_is_own_pairs(share):
    own, _ = pool(own_pairs=share)
    own.add(draw(*[([n], [1], [2], 0.0, 1.0) for n in range(own.room)]), 1.0)
    counts, files, used = [], set(), set()
    for number in range(1, 201):
        update = argparse.Namespace(number=number, indices=[8, 2, 6, 4])
        indices = own.mixed_into(update)
        update.indices = [2, 4, 6, 8]  # another order, of other ranks: the same pairs
        assert own.mixed_into(update) == indices and len(set(indices)) == 4
        counts.append(sum(index >= 100 for index in indices))
        files |= {index for index in indices if index < 100}
        used |= {index for index in indices if index >= 100}
    assert mean(counts) == pytest.approx(4 * share, abs=0.01)
    assert max(counts) - min(counts) <= 1
    assert len(used) == own.room and files == ({2, 4, 6, 8} if share < 1 else set())


# -- a run with them --------------------------------------------------------------------------------------------------


@pytest.fixture
def train(labelled_world, tmp_path):
    def run(name, *words):
        where = ["--model", labelled_world / "model", *data_of("train_safe_mm_dpo", labelled_world), *QUICK]
        size = ["--batch-size", 4, "--gradient-accumulation-steps", 1, "--max-steps", 4, "--save-steps", 2]
        run_script([*where, *size, "--output-dir", tmp_path / name, *words], train_safe_mm_dpo)
        return tmp_path / name

    return run


def test_the_numbers_of_own_pairs_are_those_of_the_models_loaded_alone(train, labelled_world):
    folder = train("run", "--combine", "soft", "--own-pairs", 0.5)
    rows = json.loads((folder / "checkpoint-4/state.json").read_text())["own_pairs"]["rows"]
    assert len(rows) == DRAWS * 4
    batch = pack([row[:3] for row in rows])
    reference = load_model(str(labelled_world / "model"), torch.float32, "cpu")
    prepare_model(reference)
    wanted = {"reference": reference.packed_logps(batch)}
    for task in ("helpful", "harmless"):
        model = load_model(str(labelled_world / "model"), torch.float32, "cpu", scores=True)
        _, head = lora.load_adapter(model, labelled_world / task, "reward", with_head=True)
        prepare_scores(model)
        wanted[task] = model.packed_scores(batch, head)
    for place, role in enumerate(("reference", "helpful", "harmless"), start=3):
        got = torch.tensor([row[place] for row in rows])
        torch.testing.assert_close(got, torch.stack(wanted[role], dim=1).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", ["additive", "margin", "soft"])
def test_own_pairs_change_what_is_learned_and_none_of_them_nothing(train, combine):
    words = ["--combine", combine, "--lambda-lr", 0]
    without, with_them = train("without", *words, "--own-pairs", 0), train("with", *words, "--own-pairs", 0.5)
    ours, theirs = adapter_of(with_them), adapter_of(without)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) > 1e-5


def test_an_update_of_own_pairs_alone_counts_their_tokens(train):
    folder = train("run", "--own-pairs", 1, "--combine", "soft")
    state = json.loads((folder / "checkpoint-2/state.json").read_text())
    lengths = [pair_length(Pair(*row[:3])) for row in state["own_pairs"]["rows"]]
    tokens = [line["num_tokens"] for line in metrics_of(folder) if "loss_H" in line]
    assert 2 * 4 * min(lengths) <= tokens[1] <= 2 * 4 * max(lengths)


def test_auto_draws_on_while_the_threshold_is_within_the_error(train):
    words = ["--lambda-lr", 0, "--own-pairs", 0, "--max-steps", 2]

    def found(name, *more):
        lines = metrics_of(train(name, *words, *more))
        return [(line["E_cost"], line["E_cost_se"]) for line in lines if "loss_H" in line][-1]

    few = found("4")  # as many prompts as an update has pairs
    steps = [few, *(found(str(count), "--cost-samples", count) for count in (8, 12, 16))]
    for name, bound in (("near", few[0] + few[1] / 100), ("far", 50.0)):
        clear = [step for step in steps if step[1] < abs(step[0] - bound)]
        wanted = (clear or steps[-1:])[0]
        assert (wanted == few) == (name == "far")
        auto = found(name, "--cost-threshold", bound, "--cost-samples", "auto")
        assert auto == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("bound", "warns"), [(-50, True), (50, False)])
def test_a_threshold_that_the_best_of_eight_responses_misses_is_told_at_the_start(train, capsys, bound, warns):
    train("run", "--max-steps", 1, "--cost-threshold", bound)
    said = capsys.readouterr().out
    assert ("The cheapest of 8 of the policy's responses to a prompt costs " in said) == warns
    assert (f"a threshold of {bound:.4f} may be out of reach" in said) == warns


def test_the_error_is_that_of_the_means_of_prompts():
    from expected_cost import Constraint

    constraint = Constraint.__new__(Constraint)
    constraint.unit, constraint.numbers = CostUnit(spread=2.0), {}
    constraint._look_at(torch.tensor([[1.0, 3.0], [2.0, 6.0], [-4.0, 0.0]]))
    means = [-1.0, -2.0, 1.0]
    assert constraint.numbers["cost"] == pytest.approx(mean(means))
    assert constraint.numbers["error"] == pytest.approx(stdev(means) / 3**0.5)
    assert constraint.numbers["score"] == pytest.approx(8 / 6)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--own-pairs", 1.5], "--own-pairs: has to be at most 1, got 1.5"),
        (["--own-pairs", -0.1], "--own-pairs: has to be at least 0, got -0.1"),
        (
            ["--own-pairs", 0.5, "--lambda-init", 0],
            "--own-pairs are of the samples of E[cost], and --lambda-init 0 takes none: leave one of them out",
        ),
        (
            ["--own-pairs", 0.5, "--cost-estimate", "snis"],
            "--own-pairs are of the samples of E[cost], and --cost-estimate snis takes none: leave one of them out",
        ),
        (["--own-pairs", 0.5, "--w", 0, "--helpful-rm-path", "nowhere"], "nowhere is no reward model"),
        (["--own-pairs", 0.5, "--harmless-rm-path", "nowhere"], "nowhere is no reward model"),
        (["--harm-rate", 0.05], "was trained without safety labels: train it with them, or give --cost-threshold"),
        (
            ["--harm-rate", 0.05, "--cost-threshold", 0],
            "--harm-rate is a threshold, and --cost-threshold another: leave one of them out",
        ),
        (["--harm-rate", 1], "--harm-rate: has to be below 1, got 1"),
        (["--cost-samples", 1], "--cost-samples: has to be at least 2, got 1"),
        (["--score-units", "spread"], "--score-units spread needs the validation scores of"),
    ],
)
def test_mistakes(words, sentence, train, labelled_world, tmp_path, capsys):
    if words[0] in ("--harm-rate", "--score-units"):
        folder = shutil.copytree(labelled_world / "harmless", tmp_path / "other")
        (folder / "manifest.json").unlink()
        record = json.loads((folder / "reward_model.json").read_text()) | {"calibrated": False}
        record |= {"validation": None} if words[0] == "--score-units" else {}
        (folder / "reward_model.json").write_text(json.dumps(record))
        words = [*words, "--harmless-rm-path", folder]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train("run", *words)
    assert exit.value.code == 2
    assert sentence in one_line(capsys)
    assert not (tmp_path / "run").exists()
