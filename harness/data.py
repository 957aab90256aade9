"""The pairs of a run, and how they are cut into updates and passes."""

from packing import epoch_plan, pack, passes_of_rank, passes_of_ranks, rows_of_run
from preference_data import fingerprint


def pair_length(pair):
    """Tokens of a packed pair, which has its prompt once."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


class Data:
    """The pairs of a run, the places of those to train on and of those held out, and how they are cut into passes."""

    def __init__(self, pairs, train, held_out, args, world):
        self.pairs, self.train, self.held_out, self.world = pairs, train, held_out, world
        self.lengths = [pair_length(pair) for pair in pairs]  # tokens
        self.cut = {"ranks": world.size, "batch_size": args.batch_size, "budget": args.tokens_per_microbatch}
        self.shuffle = {"seed": args.seed, "accumulation": args.gradient_accumulation_steps}
        self.updates_per_epoch = len(self.updates(0))
        self.num_updates = args.epochs * self.updates_per_epoch
        if args.max_steps:
            self.num_updates = min(self.num_updates, args.max_steps)
        self.needed = rows_of_run(self.updates, self.num_updates, held_out)  # of these a frozen model is asked
        self.train_sha256 = fingerprint([pairs[i] for i in train])

    def batch(self, indices):
        """The pairs at these places, packed, on the device."""
        return pack([self.pairs[i] for i in indices], self.world.device)

    def example(self):
        """{"example": a packed pair with pictures}, or {} where there is none."""
        seeing = next((pair for pair in self.pairs if pair.pictures), None)
        return {"example": pack([seeing], self.world.device)} if seeing else {}

    def how_pictures_are_made(self):
        """{"pictures": sha256 of the settings of their processor}, or {} where there is none."""
        seeing = next((pair for pair in self.pairs if pair.pictures), None)
        return {"pictures": seeing.pictures.reader.fingerprint()} if seeing else {}

    def updates(self, epoch):
        """Of one epoch: [(pairs in the update, passes of each rank)]."""
        return epoch_plan(self.train, epoch, **self.shuffle, **self.cut, lengths=self.lengths)

    def passes_of_ranks(self, indices):
        """The pairs of an update at these places, cut into the passes of each rank."""
        indices = sorted(indices, key=lambda i: -self.lengths[i]) if self.cut["budget"] else indices
        return passes_of_ranks(indices, **self.cut, lengths=self.lengths)

    def passes(self, indices, lengths=None):
        """This rank's share of the pairs at these places, cut into passes."""
        return passes_of_rank(indices, self.world.rank, **self.cut, lengths=lengths or self.lengths)
