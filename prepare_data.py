"""Raw preference data -> data/{train,val,test}/{helpful,harmless}_pairs.jsonl, split by prompt, each row accounted for.

A row out:  prompt, chosen_response, rejected_response, dimension (helpful or harmless), and where they are known
safety_labels {"chosen": -1, "rejected": 1} (1 is harmful, -1 is safe) and category.  A file in, by its first row:

    prompt, response_0, response_1, better_response_id, safer_response_id, is_response_0_safe, is_response_1_safe
        PKU-SafeRLHF: a helpful pair by the first id, a harmless pair by the second, both with the labels
    prompt, response, is_safe, category
        BeaverTails: safe and harmful responses to one prompt, in whichever rows and files, are paired
    prompt, responses [{response, is_safe}, ...]    or    prompt, responses [...], is_safe [...]
        the same, from lists
    prompt, response_chosen, response_rejected    and the shapes of row_shapes.py, HH transcripts among them
        a pair; its dimension is the row's, or --dimension, or else what the file's name says; messages stay messages

The seed and a prompt alone decide its split: it is the same for both dimensions, and stays where it is as rows come in.

    python prepare_data.py --input pku_safe_rlhf.jsonl --safety-benchmark data/safety_benchmark.jsonl
    python prepare_data.py --input helpful-base.jsonl.gz harmless-base.jsonl.gz --output-dir data/hh
    python prepare_data.py --input_dir raw --output_dir data --train_ratio 0.8 --val_ratio 0.1 --test_ratio 0.1

Copy with: formats/ harness/ tools/
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from formats import written_files
from formats.preference_rows import harm_labels, recognise, row_texts
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import CONTEXT, check_columns, with_context
from formats.row_shapes import Shape, dual_labels, rated_responses
from harness import flags
from tools import raw_pairs
from tools.raw_pairs import DIMENSIONS, SPLITS, Answer, Preference

SUFFIXES = ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"
PAIR_FILES = [f"{split}/{dimension}_pairs.jsonl" for split in SPLITS for dimension in DIMENSIONS]


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


# -- rows: a reader gives a Reading ----------------------------------------------------------------------------------


class Reading(NamedTuple):
    prompt: str
    pairs: list  # (dimension, chosen, rejected, labels)
    responses: list  # (response, is_safe)
    categories: list  # names
    unread: tuple  # columns of text that were not read


def on_a_line(question):
    """Question and answer are two texts in raw rows, and run on in a pair: a newline keeps them apart."""
    return question.rstrip() + "\n"


DUAL = Shape("PKU-SafeRLHF", dict.fromkeys(("prompt", "response_0", "response_1"), str), dual_labels)
IDS = {"better_response_id": "helpful", "safer_response_id": "harmless"}
DOCUMENTS = Shape(
    "prompt/response_chosen/response_rejected",
    dict.fromkeys(("prompt", "response_chosen", "response_rejected"), str),
    lambda row: (on_a_line(row["prompt"]), row["response_chosen"], row["response_rejected"]),
)
ANSWER = Shape("prompt/response/is_safe", dict.fromkeys(("prompt", "response"), str) | {"is_safe": bool}, None)
ANSWERS = Shape(
    "prompt/responses",
    {"prompt": str, "responses": list},
    None,
    lists=("responses",),
    example='{"prompt": "…", "responses": [{"response": "…", "is_safe": true}, …]}',
)
RATED = rated_responses("prompt", "responses")


def text_of(row, field):
    if not isinstance(row.get(field), str):
        raise Malformed(f"`{field}` is {'not a str' if field in row else 'missing'}")
    return row[field]


def is_safe_of(row, field="is_safe"):
    if row.get(field) not in (False, True):  # 0 and 1 are these too
        raise Malformed(f"`{field}` is {'neither true nor false' if field in row else 'missing'}")
    return bool(row[field])


def answer_of(row):
    text = text_of(row, "text" if "text" in row else "response")
    if not text.strip():
        raise Unusable("a response is empty")
    return text, is_safe_of(row)


def category_names(value):
    """Names in the forms in use: a name, a list of names, {name: whether it applies}.  Raises Malformed."""
    names = [value] if isinstance(value, str) else value or []
    if isinstance(names, dict):
        names = [name for name, applies in names.items() if applies]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Malformed("the category is neither a name, nor a list of names, nor {name: true or false}")
    return [name for name in names if name.strip()]


def read_dual(row, ids):
    fields = "is_response_0_safe", "is_response_1_safe"
    harm = [None if row.get(field) is None else -1 if is_safe_of(row, field) else 1 for field in fields]
    if harm.count(None) == 1:
        raise Malformed(f"`{fields[harm.index(None)]}` is missing and the other is there: give both or none")
    pairs = []
    for name in ids:
        better = row.get(name)
        if isinstance(better, bool) or better not in (0, 1):
            raise Malformed(f"`{name}` is {'neither 0 nor 1' if name in row else 'missing'}")
        texts = row_texts(row | {"better_response_id": int(better)}, DUAL)
        labels = None if None in harm else tuple(harm[::-1] if better else harm)
        pairs.append((IDS[name], texts.chosen, texts.rejected, labels))
    names = [name for n in (0, 1) for name in category_names(row.get(f"response_{n}_harm_category"))]
    return Reading(texts.prompt, pairs, [], names, texts.unread)


def read_answer(row):
    return reading_of_answers(row, [answer_of(row)], ANSWER.name)


def reading_of_answers(row, answers, kind):
    names = category_names(row.get("category"))
    prompt, _ = with_context(row, on_a_line(text_of(row, "prompt")))
    read = {"prompt", "response", "responses", "text", "is_safe", *CONTEXT}
    return Reading(prompt, [], answers, names, check_columns(row, read, kind, prompt, [text for text, _ in answers]))


def read_answers(row):
    responses, safe = row.get("responses"), row.get("is_safe")
    if not isinstance(responses, list) or not responses:
        raise Malformed("`responses` is not a list with something in it")
    if isinstance(safe, list):
        if len(safe) != len(responses):
            raise Malformed(f"`is_safe` has {len(safe)} entries and `responses` has {len(responses)}")
        responses = [{"response": text, "is_safe": flag} for text, flag in zip(responses, safe, strict=True)]
    if not all(isinstance(response, dict) for response in responses):
        raise Malformed("`responses` holds no {response, is_safe} objects, and `is_safe` is no list")
    return reading_of_answers(row, [answer_of(response) for response in responses], ANSWERS.name)


def read_pair(row, shape, default):
    dimension = default if row.get("dimension") is None else row["dimension"]
    if dimension is None:
        raise Malformed("`dimension` is missing, and there is no --dimension")
    if dimension not in DIMENSIONS:
        raise Malformed(f"`dimension` is {dimension!r}, neither helpful nor harmless")
    labels = harm_labels(row if "safety_labels" in row else row | {"safety_labels": row.get("labels")})
    prompt, chosen, rejected, template_args, unread = row_texts(row, shape)
    if template_args:
        raise Malformed(f"`{' and '.join(template_args)}` is not written to the pairs: train on the file as it is")
    if isinstance(prompt, list):
        prompt, chosen, rejected = map(raw_pairs.as_json, (prompt, chosen, rejected))
    return Reading(prompt, [(dimension, chosen, rejected, labels)], [], category_names(row.get("category")), unread)


def reader_of(row, where, dimension):
    """(name of the kind, reader) of a file, by its first row.  Raises DataError that shows the nearest shapes."""
    ids = [name for name in IDS if name in row]
    if ids and DUAL.fields.keys() <= row.keys():
        return f"{DUAL.name} with {' and '.join(ids)}", partial(read_dual, ids=ids)
    rated = isinstance(row.get("responses"), list) and "is_safe" not in row and RATED.fits(row)
    for shape, reader in (ANSWERS, read_answers), (ANSWER, read_answer):
        if shape.fields.keys() <= row.keys() and not (rated and shape is ANSWERS):
            return shape.name, reader
    is_documents = DOCUMENTS.fields.keys() <= row.keys()
    shape = DOCUMENTS if is_documents else recognise(row, where, (DOCUMENTS, ANSWERS, ANSWER))
    if dimension is None and row.get("dimension") is None:
        raise DataError(f"{where} does not say its dimension: pass --dimension helpful or --dimension harmless")
    said = "" if "dimension" in row else f" as {dimension}"
    return shape.name + said, partial(read_pair, shape=shape, default=dimension)


def dimension_of(source, args):
    """Of the pairs of a file that do not say it: --dimension, or the word in the names of the file and its folder."""
    words = set(re.findall(r"(?<![a-z])(?:helpful|harmless)(?![a-z])", "/".join(Path(source).parts[-2:]).lower()))
    return args.dimension or (words.pop() if len(words) == 1 else None)


def read_files(sources, args, ledger):
    """(files, preferences, answers, categories, labels), the last three by prompt.

    Raises DataError at the first malformed row, which --skip-invalid counts instead.
    """
    files, preferences = [], []
    answers, categories, labels = defaultdict(list), defaultdict(set), defaultdict(set)
    for source in sources:
        files.append({"file": source, "kind": "no row of a known kind", "read": 0, "used": 0, "dropped": {}})
        reader, not_read = None, Counter()
        for number, (where, row) in enumerate(read_rows(source), len(ledger.rows)):
            ledger.rows.append((files[-1], where, None))
            try:
                row = parse_row(row)
                json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair cannot be written
                if reader is None:
                    files[-1]["kind"], reader = reader_of(row, where, dimension_of(source, args))
                prompt, pairs, responses, names, unread = reader(row)
                key = prompt.strip()
                if not key:
                    raise Unusable("the prompt is empty")
                if any(chosen.strip() == rejected.strip() for _, chosen, rejected, _ in pairs):
                    raise Unusable("the two responses are equal")
            except (Malformed, UnicodeEncodeError) as problem:
                if not args.skip_invalid:
                    raise DataError(
                        f"{where}: {problem}; mend the row, or leave such rows out with --skip-invalid"
                    ) from None
                ledger.drop(number, "the row is malformed", detail=f": {problem}")
                continue
            except Unusable as reason:
                ledger.drop(number, str(reason))
                continue
            not_read.update(unread)
            categories[key].update(names)
            for dimension, chosen, rejected, known in pairs:
                preferences.append(Preference((number,), dimension, prompt, chosen, rejected, known))
                labels[key].update(known or ())
            for text, is_safe in responses:
                answers[key].append(Answer(number, prompt, text, is_safe))
                labels[key].add(-1 if is_safe else 1)
        if not_read:
            files[-1]["columns_not_read"] = dict(not_read.most_common())
    return files, preferences, answers, categories, labels


# -- files -----------------------------------------------------------------------------------------------------------


def check_files(args):
    """(files to read, files to write).  Raises DataError where either cannot be; changes nothing."""
    sources, folder = list(args.input or ()), Path(args.input_dir or "")
    if args.input_dir:
        found = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
        hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(folder).parts)]
        if not set(found) - set(hidden):
            raise DataError(f"--input-dir {folder} is no folder with {', '.join(SUFFIXES)} files in it: check the path")
        sources += [str(path) for path in found if path not in hidden]
    sources = {Path(source).resolve(): source for source in sources}
    output = Path(args.output_dir)
    targets = [output / name for name in (*PAIR_FILES, "account.json")]
    if args.safety_benchmark:
        targets.insert(0, Path(args.safety_benchmark))  # account.json is written last: with it the folder is whole
    if len({path.resolve() for path in targets}) < len(targets):
        raise DataError(f"--safety-benchmark {args.safety_benchmark} is the file of the pairs: name another")
    account = read_account(targets[-1])
    written = account.get("written", {})
    for path in targets:
        if any(written_files.is_same(path, source) for source in sources):
            raise DataError(
                f"{path} would be read and then replaced: choose another --output-dir, or read raw rows only"
            )
        if path.exists() and (path.is_dir() or not args.overwrite):
            raise DataError(f"{path} is there already: choose another place, or pass --overwrite")
        known = written.get(os.path.relpath(path, output))
        is_account = path == targets[-1] and written
        if path.exists() and not is_account and written_files.sha256(path) != known:
            raise DataError(f"{path} is not as account.json says it was written: move it away, or choose another place")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise DataError(f"{path} cannot be written: {parent} is not a folder you can write to")
    old = account.get("benchmark") and Path(account["benchmark"]["file"])
    if old and old.exists() and old.resolve() not in [path.resolve() for path in targets]:
        raise DataError(
            f"{old} asks prompts of the test split to be replaced: pass --safety-benchmark too, or remove it"
        )
    return list(sources.values()), targets


def read_account(path):
    """account.json of an earlier run; {} where there is none."""
    try:
        account = json.loads(path.read_text("utf-8"))
        return account if isinstance(account["written"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def write_whole(texts, targets):
    """Write {path: text} to temporary folders, then move all into place; of `targets` nothing older stays."""
    with contextlib.ExitStack() as stack:
        drafts = []
        for path, text in texts.items():
            parent = next(folder for folder in path.absolute().parents if folder.exists())
            written_files.remove_drafts(parent, ".prepare_data-")
            names = {"prefix": ".prepare_data-", "suffix": f".{os.getpid()}"}
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, **names))
            drafts.append(Path(folder) / "draft")
            drafts[-1].write_text(text, encoding="utf-8")
        for path in reversed(targets):
            path.unlink(missing_ok=True)
        for draft, path in zip(drafts, texts, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(path)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(args):
    sources, targets = check_files(args)
    # 1 rows
    ledger = raw_pairs.Ledger()
    files, preferences, answers, categories, labels = read_files(sources, args, ledger)
    # 2 pairs
    preferences += raw_pairs.pair_answers(answers, args.seed, ledger)
    kept = raw_pairs.without_copies(preferences, ledger)
    rows, dropped_responses, dropped_pairs = ledger.close({row for p in kept for row in p.rows})
    if not kept:
        reasons = "; ".join(line.strip() for line in raw_pairs.dropped(rows)) or "there is no row"
        raise DataError(f"{', '.join(sources)}: no usable pair ({reasons})")
    places = {isinstance(p.prompt, raw_pairs.Messages): ledger.rows[p.rows[0]][1] for p in kept}
    if len(places) == 2:  # a file is read by the shape of its first row
        raise DataError(f"{places[True]} holds messages and {places[False]} strings: prepare them one by one")
    # 3 splits
    count = Counter(name for names in categories.values() for name in names)
    category = {key: min(names, key=lambda name: (count[name], name)) for key, names in categories.items() if names}
    splits = {name: [] for name in PAIR_FILES}
    for p in sorted(kept, key=lambda p: raw_pairs.draw(args.seed, p.prompt, p.chosen, p.rejected)):
        splits[f"{raw_pairs.split_of(p.prompt, args.ratios, args.seed)}/{p.dimension}_pairs.jsonl"].append(p)
    texts, account = {}, {"seed": args.seed, "ratios": dict(zip(SPLITS, args.ratios, strict=True))}
    account |= {"files": files, "rows": rows, "responses": {"dropped": dropped_responses}}
    account |= {"pairs": {"made": len(preferences), "kept": len(kept), "dropped": dropped_pairs}}
    account |= raw_pairs.counts(splits)
    if args.safety_benchmark:
        pairs = [p for name, pairs in splits.items() if name.startswith("test/") for p in pairs]
        prompts = raw_pairs.benchmark(pairs, category, categories, labels, args.max_prompts, args.seed)
        if not prompts:
            raise DataError("--safety-benchmark finds no harmful prompt in the test split: leave it out, or read more")
        texts[targets[0]] = jsonl(prompts)
        account["benchmark"] = {"file": args.safety_benchmark, "prompts": len(prompts)}
        account["benchmark"]["categories"] = dict(sorted(Counter(row["category"] for row in prompts).items()))
    # 4 files: a split without pairs has none
    for name, pairs in splits.items():
        if pairs:
            texts[Path(args.output_dir) / name] = jsonl(
                raw_pairs.pair_row(p, category.get(p.prompt.strip())) for p in pairs
            )
    hashes = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    account["written"] = {os.path.relpath(path, args.output_dir): sha256 for path, sha256 in hashes.items()}
    texts[targets[-1]] = json.dumps(account, indent=1, ensure_ascii=False) + "\n"
    write_whole(texts, targets)
    print("\n".join(raw_pairs.report(account)))
    print(f"saved to {args.output_dir}")


USER_ERRORS = (DataError, OSError)

if __name__ == "__main__":
    flags.run(main, get_args(), *USER_ERRORS)
