"""Raw rows of each kind -> pairs of a dimension, and responses that are labelled safe or harmful.

A file has the kind of its first row; `reader_of` chooses the function that reads all of them.
"""

import json
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from formats import row_pictures
from formats.preference_rows import harm_labels, recognise, row_texts
from formats.row_files import DataError, Malformed, Unusable, parse_row, read_rows
from formats.row_prompts import CONTEXT, check_columns, with_context
from formats.row_shapes import Shape, dual_labels, rated_responses
from tools import prepare_pictures
from tools.prepare_pairs import DIMENSIONS, Answer, Preference, as_json, with_pictures


class Pair(NamedTuple):
    dimension: str
    chosen: str
    rejected: str
    labels: tuple | None  # of harm, (chosen, rejected): 1 is harmful, -1 is safe


class Response(NamedTuple):
    text: str
    is_safe: bool


class Reading(NamedTuple):
    """What a row says."""

    prompt: str
    pairs: list  # Pair
    responses: list  # Response
    categories: list  # names
    unread: tuple  # columns of text that were not read


class RawData(NamedTuple):
    """What all files say.  The dicts are by prompt, without white space around it."""

    files: list  # the account of each
    preferences: list  # Preference
    answers: dict  # [Answer]
    categories: dict  # names of categories
    labels: dict  # of its responses: 1 where one is harmful, -1 where one is safe


def read_files(sources, args, ledger, drafts):
    """RawData of files; their pictures go to the folder `drafts`.

    Raises DataError at the first malformed row, which --skip-invalid counts instead.
    """
    raw = RawData([], [], defaultdict(list), defaultdict(set), defaultdict(set))
    for source in sources:
        file = {"file": source, "kind": "no row of a known kind", "read": 0, "used": 0, "dropped": {}}
        raw.files.append(file)
        read_row, unread = None, Counter()
        for where, row in read_rows(source):
            number = ledger.add(file, where)
            try:
                row, given = row_pictures.take(parse_row(row), row_pictures.WRITTEN)
                json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair cannot be written
                if read_row is None:
                    file["kind"], read_row = reader_of(row, where, dimension_of(source, args))
                reading = read_row(row)
                check_texts(reading)
                row_pictures.check_places(reading.prompt.count(row_pictures.WRITTEN) if given else 0, len(given))
                pictures = [prepare_pictures.keep(picture, source, drafts) for picture in given]
            except (Malformed, UnicodeEncodeError) as problem:
                if not args.skip_invalid:
                    raise DataError(
                        f"{where}: {problem}; mend the row, or leave such rows out with --skip-invalid"
                    ) from None
                ledger.drop_row(number, "the row is malformed", detail=f": {problem}")
                continue
            except Unusable as reason:
                ledger.drop_row(number, str(reason))
                continue
            unread.update(reading.unread)
            reading = reading._replace(prompt=with_pictures(reading.prompt, pictures))
            add_reading(raw, reading, number)
        if unread:
            file["columns_not_read"] = dict(unread.most_common())
    return raw


def check_texts(reading):
    """Raise Unusable for a row that cannot teach anything."""
    if not reading.prompt.strip():
        raise Unusable("the prompt is empty")
    if any(pair.chosen.strip() == pair.rejected.strip() for pair in reading.pairs):
        raise Unusable("the two responses are equal")


def add_reading(raw, reading, number):
    """Add what row `number` of the ledger says to all that was read."""
    prompt, key = reading.prompt, reading.prompt.strip()
    raw.categories[key].update(reading.categories)
    for pair in reading.pairs:
        raw.preferences.append(Preference((number,), pair.dimension, prompt, pair.chosen, pair.rejected, pair.labels))
        raw.labels[key].update(pair.labels or ())
    for response in reading.responses:
        raw.answers[key].append(Answer(number, prompt, response.text, response.is_safe))
        raw.labels[key].add(-1 if response.is_safe else 1)


# -- the kind of a file ----------------------------------------------------------------------------------------------


def on_a_line(question):
    """Question and answer are two texts in raw rows, and run on in a pair: a newline keeps them apart."""
    return question.rstrip() + "\n"


DUAL = Shape("PKU-SafeRLHF", dict.fromkeys(("prompt", "response_0", "response_1"), str), dual_labels)
DUAL_IDS = {"better_response_id": "helpful", "safer_response_id": "harmless"}  # the dimension of each
DOCUMENTS = Shape(
    "prompt/response_chosen/response_rejected",
    dict.fromkeys(("prompt", "response_chosen", "response_rejected"), str),
    lambda row: (on_a_line(row["prompt"]), row["response_chosen"], row["response_rejected"]),
)
ANSWER = Shape("prompt/response/is_safe", dict.fromkeys(("prompt", "response"), str) | {"is_safe": bool}, None)
SEEN_ANSWER = Shape(
    "question/response/is_response_safe", dict.fromkeys(("question", "response", "is_response_safe"), str), None
)
ANSWERS = Shape(
    "prompt/responses",
    {"prompt": str, "responses": list},
    None,
    lists=("responses",),
    example='{"prompt": "…", "responses": [{"response": "…", "is_safe": true}, …]}',
)
RATED = rated_responses("prompt", "responses")


def reader_of(row, where, dimension):
    """(name of the kind, reader) of a file, by its first row.  Raises DataError that shows the nearest shapes."""
    ids = [name for name in DUAL_IDS if name in row]
    if ids and has_fields(row, DUAL):
        return f"{DUAL.name} with {' and '.join(ids)}", partial(read_dual, ids=ids)
    is_rated = isinstance(row.get("responses"), list) and "is_safe" not in row and RATED.fits(row)
    if has_fields(row, ANSWERS) and not is_rated:
        return ANSWERS.name, read_answers
    if has_fields(row, ANSWER):
        return ANSWER.name, read_answer
    if has_fields(row, SEEN_ANSWER):
        return SEEN_ANSWER.name, read_seen_answer
    shape = DOCUMENTS if has_fields(row, DOCUMENTS) else recognise(row, where, (DOCUMENTS, ANSWERS, ANSWER))
    if dimension is None and row.get("dimension") is None:
        raise DataError(f"{where} does not say its dimension: pass --dimension helpful or --dimension harmless")
    kind = shape.name if "dimension" in row else f"{shape.name} as {dimension}"
    return kind, partial(read_pair, shape=shape, default=dimension)


def has_fields(row, shape):
    return shape.fields.keys() <= row.keys()


def dimension_of(source, args):
    """Of the pairs of a file that do not say it: --dimension, or the word in the names of the file and its folder."""
    words = set(re.findall(r"(?<![a-z])(?:helpful|harmless)(?![a-z])", "/".join(Path(source).parts[-2:]).lower()))
    return args.dimension or (words.pop() if len(words) == 1 else None)


# -- a row of each kind -> a Reading ---------------------------------------------------------------------------------


def read_dual(row, ids):
    fields = "is_response_0_safe", "is_response_1_safe"
    harm = [None if row.get(field) is None else -1 if is_safe_of(row, field) else 1 for field in fields]
    if harm.count(None) == 1:
        raise Malformed(f"`{fields[harm.index(None)]}` is missing and the other is there: give both or none")
    pairs = []
    for name in ids:
        chosen_id = row.get(name)
        if isinstance(chosen_id, bool) or chosen_id not in (0, 1):
            raise Malformed(f"`{name}` is {'neither 0 nor 1' if name in row else 'missing'}")
        texts = row_texts(row | {"better_response_id": int(chosen_id)}, DUAL)
        labels = (harm[int(chosen_id)], harm[1 - int(chosen_id)]) if None not in harm else None
        pairs.append(Pair(DUAL_IDS[name], texts.chosen, texts.rejected, labels))
    names = [name for n in (0, 1) for name in category_names(row.get(f"response_{n}_harm_category"))]
    return Reading(texts.prompt, pairs, [], names, texts.unread)


def read_answer(row):
    return reading_of_responses(row, [response_of(row)], ANSWER.name)


def read_seen_answer(row):
    """BeaverTails-V: a question about a picture, a response, and whether that is safe, yes or no."""
    is_safe = {"yes": True, "true": True, "no": False, "false": False}.get(str(row.get("is_response_safe")).lower())
    if is_safe is None:
        raise Malformed("`is_response_safe` is neither yes nor no")
    rest = {name: value for name, value in row.items() if name not in ("question", "is_response_safe")}
    row = rest | {"prompt": text_of(row, "question"), "is_safe": is_safe}
    return reading_of_responses(row, [response_of(row)], SEEN_ANSWER.name)


def read_answers(row):
    responses, is_safe = row.get("responses"), row.get("is_safe")
    if not isinstance(responses, list) or not responses:
        raise Malformed("`responses` is not a list with something in it")
    if isinstance(is_safe, list):
        if len(is_safe) != len(responses):
            raise Malformed(f"`is_safe` has {len(is_safe)} entries and `responses` has {len(responses)}")
        responses = [{"response": text, "is_safe": flag} for text, flag in zip(responses, is_safe, strict=True)]
    if not all(isinstance(response, dict) for response in responses):
        raise Malformed("`responses` holds no {response, is_safe} objects, and `is_safe` is no list")
    return reading_of_responses(row, [response_of(response) for response in responses], ANSWERS.name)


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
        prompt, chosen, rejected = as_json(prompt), as_json(chosen), as_json(rejected)
    names = category_names(row.get("category"))
    return Reading(prompt, [Pair(dimension, chosen, rejected, labels)], [], names, unread)


def reading_of_responses(row, responses, kind):
    names = category_names(row.get("category"))
    prompt, _ = with_context(row, on_a_line(text_of(row, "prompt")))
    columns = {"prompt", "response", "responses", "text", "is_safe", *CONTEXT}
    unread = check_columns(row, columns, kind, prompt, [response.text for response in responses])
    return Reading(prompt, [], responses, names, unread)


# -- fields ----------------------------------------------------------------------------------------------------------


def text_of(row, field):
    if not isinstance(row.get(field), str):
        raise Malformed(f"`{field}` is {'not a str' if field in row else 'missing'}")
    return row[field]


def is_safe_of(row, field="is_safe"):
    if row.get(field) not in (False, True):  # 0 and 1 are these too
        raise Malformed(f"`{field}` is {'neither true nor false' if field in row else 'missing'}")
    return bool(row[field])


def response_of(row):
    text = text_of(row, "text" if "text" in row else "response")
    if not text.strip():
        raise Unusable("a response is empty")
    return Response(text, is_safe_of(row))


def category_names(value):
    """Names in the forms in use: a name, a list of names, {name: whether it applies}.  Raises Malformed."""
    names = [value] if isinstance(value, str) else value or []
    if isinstance(names, dict):
        names = [name for name, applies in names.items() if applies]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Malformed("the category is neither a name, nor a list of names, nor {name: true or false}")
    return [name for name in names if name.strip()]
