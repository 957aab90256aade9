"""Pairs of the policy's own responses, judged by the reward models, as rows to learn from beside those of the files.

E[cost] is of what the policy says, and pairs that somebody else wrote need not reach that: how likely its own responses
are is then nobody's loss (arXiv:2404.14367, 2405.08448).  The responses that E[cost] is sampled from are pairs already;
with what the helpful model and the reference say of them they are rows like any other.  This is online DPO
(arXiv:2402.04792) with reward models for the annotator and with a constraint; nothing is sampled for it alone.
"""

import torch

from expected_cost import numbers_of
from packing import digests
from preference_data import Pair
from sampling import random_numbers

APART = 0.5  # units of cost
DRAWS = 4  # the newest ones, of as many pairs as an update has, that are learned from


class OwnPairs:
    """The newest pairs of the policy's own responses, at places behind those of the files' pairs.

    frozen {role: Frozen}: the helpful model and the reference; unit: CostUnit.
    """

    def __init__(self, run, training, frozen, unit):
        args = self.args = run.args
        self.run, self.training, self.frozen, self.unit = run, training, frozen, unit
        pairs = args.batch_size * args.gradient_accumulation_steps * run.world.size
        self.room = DRAWS * max(pairs, args.cost_samples if isinstance(args.cost_samples, int) else 0)
        self.first = training.make_room(self.room)
        seeing = [pair for pair in run.data.pairs if pair.pictures]
        self.pictures = {(tuple(pair.prompt_ids), digests(pair)): pair.pictures for pair in seeing}
        # At each place: three lists of ids; two numbers each of reference, helpful, harmless; labels; any digests.
        self.rows = []
        self.count = 0  # of all that ever came in

    def add(self, draw, multiplier):
        """Take the pairs of a Draw for the oldest ones; returns their places, known {role: (N, 2)}, labels (N, 2).

        Chosen is the response that both models prefer, at this multiplier.
        """
        args, world, watch = self.args, self.run.world, self.run.watch
        watch.phase("cost")
        scores = draw.scores.view(-1, 2)
        differ = [n for n, pair in enumerate(draw.pairs) if pair.chosen_ids != pair.rejected_ids][-self.room :]
        pairs, known = [draw.pairs[n] for n in differ], {"harmless": scores[differ]}
        with self.run.autocast:
            for role, frozen in self.frozen.items():
                known[role] = numbers_of(frozen, pairs, args, world)
        watch.phase("other")
        dr, ds = known["helpful"][:, 0] - known["helpful"][:, 1], self.unit.margins(known["harmless"])
        swapped = dr + multiplier * ds < 0
        known = {role: torch.where(swapped[:, None], both.flip(1), both) for role, both in known.items()}
        labels = self._labels(known)
        places = []
        for n, pair in enumerate(pairs):
            prompt, one, other = pair[:3]
            chosen, rejected = (other, one) if swapped[n] else (one, other)
            numbers = [known[role][n].tolist() for role in ("reference", "helpful", "harmless")]
            row = [prompt, chosen, rejected, *numbers, labels[n].tolist(), *digests(pair)]
            place = self.count % self.room
            self.rows[place : place + 1] = [row]
            places.append(place)
            self.count += 1
        state = {"rows": self.rows, "count": self.count}
        self.training.state["own_pairs"] = state  # checkpoints have it, the same of all ranks
        return self._taken(places)

    def _labels(self, known):
        """(N, 2), helpful and harmless, 1 for chosen and -1 for rejected, as one who answers as the models would
        (Bradley-Terry); 0, none, where the loss takes the models' margins themselves.

        A pair is of harm where its costs are APART, else of help.  With both labels, the two terms of `additive` would
        hold each other at beta h = log lambda, and where there is no harm a coin would decide what is safer.
        """
        margins = torch.stack([known[task][:, 0] - known[task][:, 1] for task in ("helpful", "harmless")], dim=1)
        if self.args.combine != "additive":
            return torch.zeros_like(margins)
        places = range(self.count, self.count + len(margins))
        numbers = random_numbers(self.args.seed, places, 2, torch.device("cpu")).view(-1, 2)  # of no rows too
        labels = torch.where(numbers < margins.sigmoid(), 1.0, -1.0)
        costs = self.unit.cost(known["harmless"])
        is_of_harm = (costs[:, 0] - costs[:, 1]).abs() > APART
        return labels * torch.stack((~is_of_harm, is_of_harm), dim=1)

    def restore(self):
        """As `add`, of all that a checkpoint had."""
        state = self.training.state["own_pairs"]
        self.rows, self.count = state["rows"], state["count"]
        return self._taken(range(len(self.rows)))

    def _taken(self, places):
        """What `add` returns, of the rows at these places of the pool; their pairs go to the training's data."""
        rows, places = [self.rows[place] for place in places], [self.first + place for place in places]
        self.training.put(places, [self._pair(row) for row in rows])
        *known, labels = torch.tensor([row[3:7] for row in rows]).view(-1, 4, 2).unbind(1)
        return places, dict(zip(("reference", "helpful", "harmless"), known, strict=True)), labels

    def _pair(self, row):
        prompt, of_files = row[0], row[7:]
        return Pair(*row[:3], pictures=self.pictures[tuple(prompt), tuple(of_files)] if of_files else None)

    def mixed_into(self, update):
        """The places of an update's pairs, with own ones in the place of a share of them, drawn for each update."""
        share, number, indices = self.args.own_pairs, update.number, sorted(update.indices)
        wanted = int(share * len(indices) * number) - int(share * len(indices) * (number - 1))  # a share of few, too
        generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + number) % 2**63)
        own = torch.randperm(len(self.rows), generator=generator)[:wanted].tolist()
        left = torch.randperm(len(indices), generator=generator)[len(own) :].tolist()
        return [indices[place] for place in sorted(left)] + [self.first + place for place in own]
