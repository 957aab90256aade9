"""Raw preference data -> data/{train,val,test}/{helpful,harmless}_pairs.jsonl, split by prompt, each row accounted for.

A row out:  prompt, chosen_response, rejected_response, dimension (helpful or harmless), and where they are known
safety_labels {"chosen": -1, "rejected": 1} (1 is harmful, -1 is safe) and category.  A file in, by its first row:

    prompt, response_0, response_1, better_response_id, safer_response_id, is_response_0_safe, is_response_1_safe
        PKU-SafeRLHF: a helpful pair by the first id, a harmless pair by the second, both with the labels
    prompt, response, is_safe, category
        BeaverTails: safe and harmful responses to one prompt, in whichever rows and files, are paired
    question, image, response, is_response_safe, category
        BeaverTails-V: the same, of one question about one picture
    prompt, responses [{response, is_safe}, ...]    or    prompt, responses [...], is_safe [...]
        the same, from lists
    prompt, response_chosen, response_rejected    and the shapes of formats/row_shapes.py, HH transcripts among them
        a pair; its dimension is the row's, or --dimension, or else what the file's name says; messages stay messages

Pictures (image, images) beside any of these are copied to images/, under the sha256 of their bytes.
The seed and a prompt, with its pictures, alone decide its split: it is the same for both dimensions, and stays where it
is as rows come in.

    python prepare_data.py --input pku_safe_rlhf.jsonl --safety-benchmark data/safety_benchmark.jsonl
    python prepare_data.py --input helpful-base.jsonl.gz harmless-base.jsonl.gz --output-dir data/hh
    python prepare_data.py --input_dir raw --output_dir data --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1

Copy with: formats/ harness/ tools/
"""

import hashlib
import json
import os
from collections import Counter

from formats.row_files import DataError
from harness import endings, flags
from tools import prepare_account, prepare_pairs
from tools.prepare_files import IMAGES, check_files, no_drafts_left, write_whole
from tools.prepare_pairs import DIMENSIONS, SPLITS
from tools.prepare_rows import read_files


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    ratio, count = flags.number(float, least=0, most=1), flags.number(int, least=0)
    seed = flags.number(int, least=0, below=2**63)
    add = parser.group("data")
    add("--input", "--raw-data-paths", nargs="+", metavar="FILE", help="raw rows: .jsonl, .json, .csv, .tsv, .parquet")
    add("--input-dir", metavar="DIR", help="all such files, and gzip of them, in it and in its folders")
    add("--dimension", choices=DIMENSIONS, help="of pairs that do not say it (default: what the file's name says)")
    add("--skip-invalid", action="store_true", help="leave malformed rows out instead of stopping at the first")
    add = parser.group("splits")
    add("--train-ratio", type=ratio, default=0.8, metavar="R", help="share of the prompts")
    add("--val-ratio", type=ratio, default=0.1, metavar="R", help="share of the prompts")
    add("--test-ratio", type=ratio, default=0.1, metavar="R", help="share of the prompts")
    add("--seed", type=seed, default=42, metavar="N", help="of split, order and pairing")
    add = parser.group("output")
    add("--output-dir", default="data", metavar="DIR", help="where train, val, test and account.json go")
    add("--overwrite", action="store_true", help="replace the prepared files that the output folder holds")
    add("--safety-benchmark", metavar="FILE", help="also write harmful prompts of the test split with their categories")
    add("--max-prompts", type=count, default=200, metavar="N", help="of the benchmark; 0: all")
    args = parser.parse_args(argv)
    args.ratios = args.train_ratio, args.val_ratio, args.test_ratio
    if abs(sum(args.ratios) - 1) > 1e-6:
        parser.error(f"--train-ratio, --val-ratio and --test-ratio add up to {sum(args.ratios):g}: make it 1")
    if not args.input and not args.input_dir:
        parser.error("there is nothing to read: name raw rows with --input FILE or --input-dir DIR")
    if args.safety_benchmark and not args.test_ratio:
        parser.error("--safety-benchmark takes its prompts from the test split, and --test-ratio is 0: raise it")
    if "max_prompts" in args.given and not args.safety_benchmark:
        parser.error("--max-prompts has no effect without --safety-benchmark: leave it out")
    return args


def check_usable(kept, rows, ledger, sources):
    """Raise DataError where no pair is left, or where some are messages and others strings."""
    if not kept:
        reasons = "; ".join(map(str.strip, prepare_account.reasons(rows["dropped"]))) or "there is no row"
        raise DataError(f"{', '.join(sources)}: no usable pair ({reasons})")
    places = {}  # file:line of the last pair of each kind: a file is read by the shape of its first row
    for pair in kept:
        is_chat = isinstance(prepare_pairs.parts_of(pair.prompt)[1], prepare_pairs.Messages)
        kind = "messages" if is_chat else "strings"
        places[kind] = ledger.rows[pair.rows[0]].place
    if len(places) == 2:
        raise DataError(f"{places['messages']} holds messages and {places['strings']} strings: prepare them one by one")


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(args):
    sources, targets = check_files(args)
    with no_drafts_left(targets):
        prepare(args, sources, targets)


def prepare(args, sources, targets):
    # 1 rows: what the raw files say
    ledger = prepare_account.Ledger()
    raw = read_files(sources, args, ledger, targets.drafts() / IMAGES)

    # 2 pairs: one of each
    preferences = raw.preferences + prepare_pairs.pair_answers(raw.answers, args.seed, ledger)
    kept = prepare_pairs.without_copies(preferences, ledger)
    rows = ledger.count_rows(used={row for pair in kept for row in pair.rows})
    check_usable(kept, rows, ledger, sources)

    # 3 splits: by prompt
    category = prepare_pairs.rarest_categories(raw.categories)
    splits = prepare_pairs.in_splits(kept, args.ratios, args.seed)
    benchmark = []
    if args.safety_benchmark:
        test = [pair for pairs in splits["test"].values() for pair in pairs]
        images = os.path.relpath(targets.account.parent / IMAGES, targets.benchmark.parent)
        known = category, raw.categories, raw.labels
        benchmark = prepare_pairs.benchmark(test, *known, args.max_prompts, args.seed, images)
        if not benchmark:
            raise DataError("--safety-benchmark finds no harmful prompt in the test split: leave it out, or read more")

    # 4 texts: a split without pairs has no file
    texts = {targets.benchmark: jsonl(benchmark)} if benchmark else {}
    for (split, dimension), path in targets.pairs.items():
        if pairs := splits[split][dimension]:
            images = os.path.relpath(targets.account.parent / IMAGES, path.parent)
            texts[path] = jsonl(
                prepare_pairs.pair_row(pair, category.get(pair.prompt.strip()), images) for pair in pairs
            )
    pictures = sorted({name for pair in kept for name in prepare_pairs.parts_of(pair.prompt)[0]})

    # 5 account: what became of every row
    account = {"seed": args.seed, "ratios": dict(zip(SPLITS, args.ratios, strict=True)), "files": raw.files}
    account |= {"rows": rows, "responses": {"dropped": ledger.count_parts(ledger.dropped_responses)}}
    dropped_pairs = ledger.count_parts(ledger.dropped_pairs)
    account["pairs"] = {"made": len(preferences), "kept": len(kept), "dropped": dropped_pairs}
    account |= prepare_account.count_splits(splits)
    if benchmark:
        categories = dict(sorted(Counter(row["category"] for row in benchmark).items()))
        account["benchmark"] = {"file": args.safety_benchmark, "prompts": len(benchmark), "categories": categories}
    account["written"] = {
        os.path.relpath(path, args.output_dir): hashlib.sha256(text.encode()).hexdigest()
        for path, text in texts.items()
    } | {f"{IMAGES}/{name}": name.partition(".")[0] for name in pictures}

    # 6 save
    texts[targets.account] = json.dumps(account, indent=1, ensure_ascii=False) + "\n"
    write_whole(texts, pictures, targets)
    print("\n".join(prepare_account.report(account)))
    if pictures:
        print(f"pictures: {len(pictures):,}, in {IMAGES}/")
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    endings.run(main, get_args())
