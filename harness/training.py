"""The updates of a run: optimiser, schedule, gradients of all ranks, sums for the log, progress, checkpoints.

The loop is the script's own:

    training = Training(run, policy, parameters, METRICS, "policy model")
    for update in training.updates():
        for indices in update.passes:                                   of this rank
            losses, metrics = ...
            training.backward(losses.sum() / update.num_pairs, metrics)
        training.all_reduce_gradients()
        training.step()
        if update.logs:
            training.log(training.means(), SHOWN)
        training.save_if_due()
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

import distributed
from harness import checkpoints, flags, memory_report, metrics_log, optimizers, run_files, speed
from harness.data import pair_length
from preference_data import Pair


class Update(NamedTuple):
    number: int  # from 1
    indices: list  # the places of its pairs, those of all ranks
    passes: Iterator  # of this rank: lists of places
    logs: bool  # whether a log line is due behind it
    evaluates: bool
    ends_epoch: bool
    is_last: bool

    @property
    def num_pairs(self):
        """Of all ranks."""
        return len(self.indices)


def rows_of(metrics, names):
    """Metrics {name: (B,)} of a pass as (len(names), B) without gradient; "pairs" is 1 for each pair."""
    first = next(iter(metrics.values())).detach()
    metrics = metrics | {"pairs": torch.ones_like(first)}
    return torch.stack([metrics[name].detach().to(first.dtype) for name in names])


class HeldOut:
    """An evaluation: `passes` of this rank, whose metrics go to `add`.  names, counts: as Training has them."""

    def __init__(self, names, counts, passes, world):
        self.names, self.counts, self.passes, self.world = names, counts, passes, world
        self.sums = torch.zeros(2, len(names), dtype=torch.float64)  # of the metrics, of their squares

    def add(self, metrics):
        """Metrics {name: (B,)} of a pass."""
        rows = rows_of(metrics, self.names).cpu().double()
        self.sums += torch.stack((rows.sum(1), (rows**2).sum(1)))

    def means(self):
        """{metric: mean} over the pairs of all ranks, of metrics that any pair has; behind them {metric_ci95: half its
        95 % interval} of those that are means over pairs.  All ranks have to ask."""
        sums, squares = distributed.all_reduce_sum(self.sums, self.world).tolist()
        sums, squares = dict(zip(self.names, sums, strict=True)), dict(zip(self.names, squares, strict=True))
        means, intervals = {}, {}
        for name, count in self.counts.items():
            if number := sums[count]:
                means[name] = sums[name] / number
                if count != "tokens":  # whose squares are of sums over tokens
                    variance = max(squares[name] / number - means[name] ** 2, 0)
                    intervals[f"{name}_ci95"] = 1.96 * (variance / number) ** 0.5
        return means | intervals


class Training:
    """The updates of a run, from where its checkpoint was.

    model: what is put in training mode; parameters: what is trained.  counts: {metric: what its sum is divided by},
    "pairs" or a name that the metrics of a pass have besides.  name: of what is trained, for the log.
    What else a checkpoint keeps: state {name: JSON}, and tensors {name: tensor of this rank}; a resumed run finds those
    of all ranks there, in their first dimension.
    """

    def __init__(self, run, model, parameters, counts, name, state=None, tensors=None):
        self.run, self.args, self.world, self.watch, self.data = run, run.args, run.world, run.watch, run.data
        self.model, self.parameters, self.tensors = model, parameters, tensors or {}
        args, world = self.args, self.world
        run.say(*memory_report.start_lines(name, parameters, model, args, world), sep="\n")
        self.optimizer = optimizers.make_optimizer(parameters, args)
        self.scheduler = optimizers.make_scheduler(self.optimizer, args, self.data.num_updates, run.say)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=run.dtype == torch.float16)
        distributed.assert_same_on_all_ranks(parameters, world)
        distributed.seed_everything(args.seed + world.rank)  # from here on the draws of dropout differ between ranks
        self.counts = counts
        self.names = list(dict.fromkeys([*counts, *counts.values(), "pairs"]))  # of what is summed
        self.sums = torch.zeros(len(self.names), device=world.device)  # since the last log line
        self.grad_norms = []  # since the last log line, on the device: to look at each at once would wait for it
        self.flops = speed.useful_flops(model, self.data.pairs)
        self.state = {"step": 0, "tokens": 0, "warned": [], "logs": None} | (state or {})
        if run.checkpoint:
            self._resume()
        marks = self.state["logs"]
        self.log_file = metrics_log.MetricsLog(args, world.is_main, run.checkpoint, self.step_number, marks)

    def _resume(self):
        whole = self.parameters, self.optimizer, self.scheduler, self.scaler
        tensors, self.state = checkpoints.restore(self.run.checkpoint, *whole, self.world)
        self.sums += checkpoints.own_sums(tensors["sums"], self.world)
        self.tensors = {name: tensors[name] for name in self.tensors}
        if self.world.is_main and run_files.goes_on(self.args, self.run.checkpoint):
            checkpoints.remove_older(self.args.output_dir, self.step_number, self.args.save_total_limit)
        self.run.say(f"resumed from {self.run.checkpoint}")

    @property
    def step_number(self):
        """Updates done."""
        return self.state["step"]

    @property
    def epoch(self):
        """The one that the last update was in, from 1; 0 before the first."""
        return math.ceil(self.step_number / self.data.updates_per_epoch)

    # -- an update ---------------------------------------------------------------------------------------------------

    def updates(self):
        """The updates that are left."""
        hidden, total = not distributed.shows_bars(self.world), self.data.num_updates
        self.bar = tqdm(total=total, initial=self.step_number, desc="updates", disable=hidden)
        self.model.train()
        updates = itertools.chain.from_iterable(self.data.updates(epoch) for epoch in itertools.count())
        for _, passes_of_ranks in itertools.islice(updates, self.step_number, total):
            self.passes_of_ranks = passes_of_ranks
            self.update = self._update(passes_of_ranks)
            yield self.update
        self.bar.close()
        self.run.say("Seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.watch.read().items()))
        self.run.say(*memory_report.memory_lines(self.world), sep="\n")

    def _update(self, passes_of_ranks):
        number, args = self.step_number + 1, self.args
        is_last = number == self.data.num_updates
        return Update(
            number,
            indices=[i for passes in passes_of_ranks for indices in passes for i in indices],
            passes=self._timed(passes_of_ranks[self.world.rank]),
            logs=number % args.logging_steps == 0 or is_last,
            evaluates=bool(self.data.held_out) and (is_last or _is_due(number, args.eval_steps)),
            ends_epoch=number % self.data.updates_per_epoch == 0,
            is_last=is_last,
        )

    def instead(self, indices):
        """The update at hand with the pairs at these places, of all ranks, instead of its own."""
        self.passes_of_ranks = self.data.passes_of_ranks(indices)
        self.update = self._update(self.passes_of_ranks)
        return self.update

    def make_room(self, count):
        """Places behind those of the files, for pairs that training makes itself; returns the first."""
        data, first = self.data, len(self.data.pairs)
        data.pairs, data.lengths = data.pairs + [Pair([], [], [])] * count, data.lengths + [0] * count
        self.flops = self.flops + [0] * count
        return first

    def put(self, places, pairs):
        """Pairs at some of these places."""
        for place, pair, flops in zip(places, pairs, speed.useful_flops(self.model, pairs), strict=True):
            self.data.pairs[place], self.data.lengths[place], self.flops[place] = pair, pair_length(pair), flops

    def _timed(self, passes):
        for indices in passes:
            self.watch.phase("forward")
            yield indices

    def backward(self, loss, metrics):
        """Add the gradient of a pass, whose loss is its part of the whole update's, and its metrics {name: (B,)}."""
        self.watch.phase("backward")
        self.scaler.scale(loss).backward()
        self.sums += rows_of(metrics, self.names).sum(1)

    def add(self, metrics):
        """Add some metrics {name: (B,)} of a pass to the sums that the next log line is the mean of."""
        for name, values in metrics.items():
            self.sums[self.names.index(name)] += values.sum()

    def all_reduce_gradients(self):
        """Sum over the ranks: one exchange."""
        self.watch.phase("communicate")
        distributed.all_reduce_gradients(self.parameters, self.world)

    def step(self):
        """Clip, step, and go on in the schedule."""
        self.watch.phase("step")
        max_norm = self.args.max_grad_norm
        norm = distributed.take_step(self.parameters, self.optimizer, self.scheduler, self.scaler, max_norm)
        self.grad_norms.append(norm)
        self.watch.phase("other")
        indices = self.update.indices
        self.state["step"] += 1
        self.state["tokens"] += sum(self.data.lengths[i] for i in indices)
        self.watch.work(len(indices), sum(self.flops[i] for i in indices))
        self.bar.update()
        if self.step_number == 1 and self.world.device.type == "cuda":
            run, lengths = self.run, self.data.lengths
            run.say(
                memory_report.first_update(run.estimate, self.args, run.checkpointing, self.passes_of_ranks, lengths)
            )

    # -- the log -----------------------------------------------------------------------------------------------------

    def means(self):
        """{metric: mean} over the pairs of all ranks since the last log line; NaN of what none of them has."""
        sums = distributed.all_reduce_sum(self.sums, self.world).tolist()
        self.totals = totals = dict(zip(self.names, sums, strict=True))
        self.sums.zero_()
        return {name: totals[name] / (totals[count] or math.nan) for name, count in self.counts.items()}

    def log(self, metrics, shown, prefix="", **constants):
        """A line of metrics.jsonl and one of the log, with the gradient's norm, the rate and `constants`.

        shown: the metrics of the line, of which those that are not finite are left out.
        """
        norms = torch.stack(self.grad_norms).tolist()
        self.grad_norms.clear()
        flags.check_norms(norms, self.step_number, self.scaler)
        metrics = metrics | {"grad_norm": norms[-1], "learning_rate": self.scheduler.get_last_lr()[0]}
        metrics |= constants | {"num_tokens": self.state["tokens"]}
        self.write(metrics)
        words = []
        for name in shown:
            if math.isfinite(metrics.get(name, math.nan)):
                number = format(metrics[name], "g" if name == "beta" else ".4f")
                if f"{name}_se" in metrics:
                    number += f" ± {metrics[f'{name}_se']:.4f}"
                words.append(f"{_label(name)}={number}")
        line = f"{prefix}Epoch {self.epoch} step {self.step_number} {' '.join(words)}"
        self.run.say(f"{line} learning_rate={metrics['learning_rate']:.2e} {self.watch.rate()}")

    def write(self, metrics):
        """A line of metrics.jsonl and of what --report-to names."""
        self.log_file.write(self.step_number, self.step_number / self.data.updates_per_epoch, metrics)

    def warn(self, sentence, about):
        """Say a sentence, if there is one, the first time that there is one about this."""
        if sentence and about not in self.state["warned"]:
            self.state["warned"].append(about)
            self.run.say(sentence)

    # -- held-out pairs ----------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation(self):
        """A HeldOut to fill, with dropout off and without gradients."""
        self.model.eval()
        with torch.no_grad():
            yield HeldOut(self.names, self.counts, self.data.passes(self.data.held_out), self.world)
        self.model.train()

    def log_held_out(self, means, shown):
        """As `log`, of what `evaluation` has found, as eval_... in metrics.jsonl.  Raises NonFinite for a loss."""
        for loss in ("loss", "loss_H", "loss_S"):
            flags.check_held_out(means.get(loss, 0.0), self.step_number)
        self.write({f"eval_{name}": mean for name, mean in means.items()})
        words = []
        for name in shown:
            if name in means:
                interval = f"±{means[f'{name}_ci95']:.4f}" if f"{name}_ci95" in means else ""
                words.append(f"{_label(name)}={means[name]:.4f}{interval}")
        self.run.say(f"Held out, step {self.step_number}: {' '.join(words)}")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_if_due(self):
        """A checkpoint every --save-steps, and where a signal asked the run to end, which it then does."""
        asked = distributed.on_any_rank(self.run.termination.asked, self.world)
        if asked or _is_due(self.step_number, self.args.save_steps):
            self._save()
        if asked:
            self.run.termination.end_training(asked, self.args, self.step_number, self.run.say)

    def _save(self):
        flags.check_weights(self.parameters, self.step_number)
        own = {"rng_state": checkpoints.rng_state(self.world.device), "sums": self.sums} | self.tensors
        tensors = {name: distributed.gather(tensor, self.world) for name, tensor in own.items()}
        self.state |= {"identity": self.run.identity, "logs": self.log_file.marks()}
        whole = self.parameters, self.optimizer, self.scheduler, self.scaler
        write_adapter = None
        if self.run.has_adapter:
            write_adapter = lambda folder: self.run.write_adapter(folder, self.model)
        checkpoints.save(self.args, self.world, *whole, tensors, self.state, self.run.say, write_adapter)


def _label(name):
    """What a log line calls a metric: without its group, unless that is one of TRL's."""
    group, _, last = name.rpartition("/")
    return name if group in ("rewards", "logps") else last


def _is_due(number, every):
    return every > 0 and number % every == 0
