"""A training run around its method: where it computes, what it reads and loads, what it is, and what it leaves behind.

run = Run(args, __file__, TOY)                      ranks and device; the checkpoint to go on from; `toy` -> files
tokenizer = run.load_tokenizer()
pairs, train, held_out = run.read_pairs(...)
data = run.plan(pairs, train, held_out)             updates and passes of every epoch; the ranks have to agree
policy = run.load(args.model)
parameters = run.add_adapter(policy, "policy")
run.prepare(policy)                                 packed pairs, gradient checkpointing
parameters = run.begin(policy, parameters, {"reference": reference})     from here on it is what it is
ref_logps = run.cached("reference", reference)      what a frozen model says of the pairs, once and for all
training = Training(run, ...)                       the updates: training.py
run.save_policy(training, policy, tokenizer, "DPO") weights, tokenizer, card, record; ends the exchange of ranks
"""

import argparse
import gc
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import distributed
import lora
import lora_targets
from formats import model_files
from formats.model_files import enable_checkpointing, load_model, load_skeleton, save_whole, sees
from harness import (
    checkpoints,
    device,
    endings,
    flags,
    four_bit,
    locks,
    memory_estimate,
    memory_report,
    optimizers,
    run_files,
    score_cache,
    sharding,
    speed,
    toys,
)
from harness.data import Data, pair_length
from packed_model import prepare_model
from packing import hold_out, largest_pass, pack
from preference_data import DataError, fingerprint, load_pairs

CHECKPOINT_LAYOUT = 3  # of what `begin` and Training put into a checkpoint; another layout is refused


@dataclass(eq=False)
class Frozen:
    """A model that stays as it is: asked for the log-probs of responses or, with the head of a reward model, scores."""

    model: Any
    adapter: str | None = None  # the one of its adapters that is on
    head: torch.Tensor | None = None  # (1, H) of a reward model
    sha256: str = ""  # of all its numbers depend on; Run.begin sets it on rank 0

    def __call__(self, batch):
        """Of chosen and of rejected, (B,) each."""
        with lora.use_adapter(self.model, self.adapter):
            return self.model.packed_logps(batch) if self.head is None else self.model.packed_scores(batch, self.head)


class Run:
    """One run of a training script.  toy: {flag: its file in a toy world} of flags that may name one, as --model may.

    Raises UserErrors before anything is written.
    """

    def __init__(self, args, script, toy):
        self.args, self.script = args, Path(script)
        self.full = getattr(args, "lora_r", None) == 0  # all weights are trained
        self.world = distributed.start(args.device, args.ddp_timeout)
        self.sharded = self.full and self.world.size > 1  # weights, gradients and optimiser, over the ranks
        self.watch = speed.Stopwatch(self.world.device, "start")
        self.checkpoint = checkpoints.find(args.output_dir, args.resume, self.say)  # a folder or None
        optimizers.check(args, self.world.device.type, self.sharded)
        if args.base_dtype == "nf4":
            four_bit.check(self.full)
        run_files.check_output(args, self.checkpoint)
        if not args.estimate_memory:  # which writes nothing
            lock, what = Path(args.output_dir) / ".lock", f"--output-dir {args.output_dir}"
            distributed.on_main(self.world, lambda: locks.hold(lock, what, self.say))
        if taken := run_files.flags_of_a_run(argparse.Namespace(**args.as_begun)):
            self.say("as the run began:", ", ".join(f"{name} {value}" for name, value in sorted(taken.items())))
        self.reader = None  # of pictures
        self.has_adapter = bool(getattr(args, "lora_r", 0))
        self.adapter_name = "policy"
        if self.world.size > 1:
            self.say(f"Distributed training initialized: world_size={self.world.size}")
        distributed.main_first(self.world, lambda: toys.take(args, {"model": "model"} | toy))

    def say(self, *text, sep=" "):
        """Print, on rank 0."""
        distributed.print0(self.world, *text, sep=sep)

    # -- data --------------------------------------------------------------------------------------------------------

    def load_tokenizer(self):
        path = getattr(self.args, "tokenizer_name", None) or self.args.model
        return model_files.load_tokenizer(path, self.args.trust_remote_code)

    def skeleton(self, tokenizer, scores=False):
        """The model without its weights: what does not fit it shows before gigabytes are read."""
        model = load_skeleton(self.args.model, tokenizer, self.args, scores)
        if sees(model.config):
            from formats.picture_reader import PictureReader  # nobody else needs it

            self.reader = PictureReader(self.args, model.config, tokenizer)
        return model

    def estimate_memory(self, skeleton, tokenizer, reward_folders=None, vectors=0):
        """Whether --estimate-memory was asked for, which is then answered: the run ends there."""
        other = getattr(self.args, "ref_model_path", None)
        reference = load_skeleton(other, tokenizer, self.args) if other else None
        self.estimate = memory_estimate.Estimate(skeleton, self.world.size, reference, reward_folders, vectors)
        endings.advise_on_memory = self._advise_on_memory
        if self.args.tokens_per_microbatch == "auto":
            kind, room = self.world.device.type, device.room(self.world)
            self.args.tokens_per_microbatch = self.estimate.auto_pass(self.args, kind, room)
        if self.args.estimate_memory:
            self.say(memory_report.report(self.estimate, self.args))
            distributed.stop()
        return self.args.estimate_memory

    def _advise_on_memory(self):
        phase, room = self.watch.marks[-1][0], device.own_room(self.world)
        return memory_report.out_of_memory(self.estimate, self.args, phase, room)

    def read(self, source, tokenizer, limit, prefer=None, by_default=False):
        """(pairs, lines to print) of a file, a folder or a dataset on a hub; prefer, by_default: see load_pairs."""
        self.watch.phase("tokenise")
        args = self.args
        return load_pairs(
            source,
            tokenizer=tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            limit=limit,
            skip_invalid=args.skip_invalid,
            chat_template_strings=args.chat_template_strings,
            prefer=prefer,
            by_default=by_default,
            reader=self.reader,
        )

    def read_pairs(self, source, held_out_source, tokenizer, prefer=None):
        """(pairs, places of those to train on, places of those held out): of another source, or a part of this one."""
        args = self.args
        pairs, report = self.read(source, tokenizer, args.num_samples, prefer, "num_samples" not in args.given)
        train, held_out = list(range(len(pairs))), []
        if args.eval_samples == 0:
            pass
        elif held_out_source:
            try:
                more, more_report = self.read(held_out_source, tokenizer, args.eval_samples or 0, prefer)
            except DataError as error:
                raise DataError(f"{error} (without validation: --eval-samples 0)") from None
            held_out = list(range(len(pairs), len(pairs) + len(more)))
            pairs, report = pairs + more, report + more_report
        else:
            wanted = min(100, len(pairs) // 10) if args.eval_samples is None else args.eval_samples
            train, held_out = hold_out(pairs, wanted, args.seed)
            if len(held_out) < (args.eval_samples or 0):
                raise DataError(f"--eval-samples {args.eval_samples} leaves nothing to train on: make it smaller")
            report.append(f"  held out {len(held_out):,} pairs by whole prompts, {len(train):,} to train on")
        self.say(*report, sep="\n")
        return pairs, train, held_out

    def plan(self, pairs, train, held_out, **facts):
        """The Data of the run.  Raises DeviceError unless all ranks have the same flags, pairs and `facts`."""
        args = self.args
        data = self.data = Data(pairs, train, held_out, args, self.world)
        budget, longest = args.tokens_per_microbatch, max(data.lengths)
        if 0 < budget < longest:
            self.say(f"Pairs of more than {budget} tokens take a pass each; the longest has {longest}")
        if self.world.size > 1:
            facts |= {"data": fingerprint(pairs), "checkpoint": self.checkpoint and self.checkpoint.name}
            facts |= run_files.weights_of_flags(args)
            distributed.check_same_on_all_ranks(run_files.flags_of_a_run(args) | facts, self.world)
        optimizers.check_dtype(args, self.dtype, self.sharded)
        if args.tf32:
            device.use_tf32(self.world, self.dtype)
        return data

    # -- models ------------------------------------------------------------------------------------------------------

    @cached_property
    def dtype(self):
        """What is computed with; a run that goes on takes what it began with."""
        return device.pick_dtype(self.args.dtype, self.world, checkpoints.begun_in(self.checkpoint))

    @property
    def weights_dtype(self):
        return torch.float32 if self.full else self.dtype  # weights that are trained are fp32

    @property
    def autocast(self):
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.weights_dtype != self.dtype)

    def load(self, path, scores=False):
        """A causal language model, or one with a scalar head; on the CPU where it will be sharded."""
        self.watch.phase("load")
        in_four_bits = self.args.base_dtype == "nf4"
        place = "cpu" if self.sharded or in_four_bits else self.world.device
        model = load_model(path, self.weights_dtype, place, self.args.trust_remote_code, scores)
        if in_four_bits:
            model.source_sha256 = score_cache.base_sha256(model)  # a reward model is of this base, whatever it became
            self.say(four_bit.quantise(model, self.world.device))
        return model

    def add_adapter(self, model, name):
        """What is trained: the parameters of a new LoRA adapter; with --lora-r 0 all there are."""
        args = self.args
        if self.full:
            return lora_targets.train_text(model)
        self.adapter_name = name
        distributed.seed_everything(args.seed)  # the same A on every rank
        return lora.add_adapter(model, name, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)

    def prepare(self, model, prepare=prepare_model):
        """Packed pairs where they are exact, gradient checkpointing where memory asks for it; says both."""
        self.say(
            f"{prepare(model, **self.data.example())} ({self.world.device}, {str(self.dtype).removeprefix('torch.')})"
        )
        tokens = largest_pass(**self.data.cut, lengths=self.data.lengths)
        room = device.room(self.world)
        self.checkpointing = self.estimate.checkpointing(self.args, room, tokens, model.packs_pairs)
        draws = lora.has_dropout(model)
        if self.checkpointing:
            enable_checkpointing(model, draws)
            self.say("gradient checkpointing: on")
        if self.args.compile:
            from harness import compiled  # torch's compiler takes a second to load

            self.say(compiled.compile_blocks(model, self.checkpointing, draws))

    def begin(self, model, parameters, frozen=None, **facts):
        """Fix what the run is; raise CheckpointError where it would go on as another.  Returns the parameters, sharded
        where they have to be.

        frozen: {role: Frozen}; with other weights in one of them, or other `facts`, it is another run.
        """
        frozen = frozen or {}
        self.identity = {"layout": CHECKPOINT_LAYOUT, "script": self.script.name, "dtype": str(self.dtype)}
        self.identity |= run_files.flags_that_matter(self.args, self.world.size)
        self.identity |= {"data": self.data.train_sha256} | facts | self.data.how_pictures_are_made()
        if self.world.is_main:
            bases = {}  # of models that several roles share once
            for one in [model, *(role.model for role in frozen.values())]:
                if one not in bases:
                    bases[one] = score_cache.frozen_sha256(one)
            self.identity["base model"] = bases[model]
            for name, role in frozen.items():
                weights = lora.adapter_state(role.model, role.adapter)
                if role.head is not None:
                    weights["head"] = role.head
                role.sha256 = bases[role.model]
                if weights:
                    role.sha256 += score_cache.weights_sha256(weights.items())
                self.identity[name] = role.sha256
            if self.checkpoint:
                checkpoints.check_identity(self.checkpoint, self.identity)
        if self.sharded:
            reference = frozen["reference"].model if "reference" in frozen else model
            offload = self.args.optimizer_offload
            parameters = sharding.shard(model, reference, self.world, self.dtype, self.say, offload)
        self.termination = checkpoints.Termination()
        self.watch.phase("other")
        return parameters

    def cached(self, role, frozen, pairs=None, needed=None, depends_on=""):
        """What a frozen model gives to chosen and rejected of each pair, (N, 2) on the CPU: from --cache-dir, or now.

        pairs: others than those of the run; needed: the places of those that are asked for (default: all that the run
        needs), the others are NaN; depends_on: what else than weights, tokens and type the numbers depend on.
        """
        self.watch.phase("cache")
        args, pairs = self.args, self.data.pairs if pairs is None else pairs
        needed = self.data.needed if needed is None else needed
        lengths = [pair_length(pair) for pair in pairs]
        what = f"{role} {'log-probs' if frozen.head is None else 'scores'} of {len(needed):,} pairs"
        path = score_cache.cache_path(
            args.cache_dir or f"{args.output_dir}/cache",
            role,
            weights=frozen.sha256 + depends_on,
            pairs=fingerprint(pairs),
            **self.data.how_pictures_are_made(),
            dtype=f"{self.dtype}{' sharded' if self.sharded else ''}",  # shards round elsewhere than autocast does
        )
        with self.autocast:
            scores = score_cache.pair_scores(
                path,
                len(pairs),
                needed,
                lambda indices: self.data.passes(indices, lengths),
                lambda indices: frozen(pack([pairs[i] for i in indices], self.world.device)),
                self.world,
                self.termination,
                lambda sentence: self.say(f"{what}: {sentence}"),
            )
        self._check_scores(scores[needed].isfinite().all(1), what, path)
        self.watch.phase("other")
        asked_for = torch.full_like(scores, torch.nan)
        asked_for[needed] = scores[needed]  # the file may have more, of other runs
        return asked_for

    def _check_scores(self, known, what, path):
        """End the run where a signal asked for it, or where a number is missing: known (N,) bool."""
        if signal := distributed.on_any_rank(self.termination.asked, self.world):
            kept = f"ended with {int(known.sum()):,} of the {what}, kept in {path}"
            self.termination.end(signal, f"{kept}: the same command goes on from there", self.say)
        if not known.all():
            raise FloatingPointError(f"{what} are not all finite: nothing is saved; look for broken weights or data")

    # -- the end -----------------------------------------------------------------------------------------------------

    def whole_state(self, model):
        """All weights on the CPU of rank 0 where all are trained, else None; every rank has to ask."""
        return sharding.whole_state(model, self.dtype, self.world) if self.full else None

    def write_adapter(self, folder, model):
        """The LoRA adapter in PEFT's format, a reward model's head beside it."""
        head = model.score.weight if self.adapter_name == "reward" else None
        lora.save_adapter(model, self.adapter_name, folder, self.args.model, head)

    def _write_policy(self, folder, model, tokenizer, state):
        if self.full:
            save_whole(model, folder, state)
        else:
            self.write_adapter(folder, model)
        self._write_tokenizer(folder, tokenizer)

    def _write_tokenizer(self, folder, tokenizer):
        if self.reader:
            self.reader.save(folder)
        model_files.save_tokenizer(tokenizer, folder)

    def save_epoch(self, training, policy, tokenizer):
        """The policy after an epoch, in epoch_N."""
        flags.check_weights(training.parameters, training.step_number)
        state, name = self.whole_state(policy), f"epoch_{training.epoch}"
        if self.world.is_main:
            with run_files.whole_files(self.args.output_dir) as folder:
                self._write_policy(folder / name, policy, tokenizer, state)
        self.say(f"Saved epoch {training.epoch} checkpoint to {self.args.output_dir}/{name}")

    def save_policy(self, training, policy, tokenizer, method):
        """The end of a run that has trained a policy."""
        state = self.whole_state(policy)
        with self.saving(training, policy, method) as folder:
            if folder:
                self._write_policy(folder, policy, tokenizer, state)
            if folder and self.args.save_merged:
                if four_bit.make_whole(policy):
                    self.say(f"merged: its base is what 4 bits left, made whole in {policy.dtype}")
                lora.merge_adapter(policy, self.adapter_name)
                policy.save_pretrained(folder / "merged")
                self._write_tokenizer(folder / "merged", tokenizer)

    @contextmanager
    def saving(self, training, model, method, until=None):
        """The end of a run: a folder to write to on rank 0, None on the others.  Card and record go beside what is
        written, and all of it to --output-dir at once.

        method: its name, for the card; until: the update that what is written is from, if it is not the last.
        """
        flags.check_weights(training.parameters, training.step_number)
        distributed.assert_same_on_all_ranks(training.parameters, self.world)
        training.log_file.close()
        if self.world.is_main:
            with run_files.whole_files(self.args.output_dir) as folder:
                yield folder
                history = [entry for entry in training.log_file.history if until is None or entry["step"] <= until]
                left_out = None if self.full else lora_targets.left_out(model) or []
                data = self.data.train_sha256
                card = run_files.model_card(self.args, self.script, method, history, data, left_out)
                run_files.save_run_record(folder, training.log_file, self.args, self.script, card)
            self.say(f"saved to {self.args.output_dir}")
        else:
            yield None
        distributed.stop()


def forget():
    """Let models go that nothing holds any more: a sharded one has methods that hold it."""
    gc.collect()
