"""What is asked of a policy: rows with `prompt`, or preference rows, whose responses stay behind."""

import json
import os
import re
from pathlib import Path

from formats.preference_rows import own_texts, recognise
from formats.row_files import DataError, Malformed
from formats.row_prompts import as_turns
from tools.prompts import Question, read_prompts

# Fields of a row that speak of the responses it came with: new responses leave them behind.
OF_RESPONSES = re.compile("response|chosen|rejected|reward|score|safe|dimension|messages")


def read(args, tokenizer, reader=None):
    """PromptFile of --prompts; rows that ask nothing are left out.  Raises DataError with file:line."""
    file = read_prompts(args, tokenizer, question_of, reader, leave_out=True)
    if not file.prompts:
        raise DataError(f"{args.prompts} has no row with a prompt: name a file that has")
    for prompt in file.prompts:
        if prompt.pictures:
            prompt.fields["images"] = pictures_beside(args.output, prompt)
    return file


def pictures_beside(output, prompt):
    """The pictures of a Prompt as rows of the file `output` name them: paths from its folder.  Raises DataError."""
    sources = prompt.pictures.sources
    if any(isinstance(source, bytes) for source in sources):
        raise DataError(
            f"{prompt.where}: its picture is bytes, which rows out cannot hold: write files of it with prepare_data.py"
        )
    return [os.path.relpath(source, Path(output).parent) for source in sources]


def question_of(row, where):
    """The Question of a row (dict) at file:line, with the fields that go along to the rows out: the pair's prompt where
    it is a preference row.  Raises Malformed or Unusable.
    """
    json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair cannot be written
    try:
        shape = recognise(row, where)
    except DataError:  # no preference row
        shape = None
    prompt = own_texts(row, shape)[0] if shape else row.get("prompt")
    if not isinstance(prompt, str | list):
        raise Malformed(f"`prompt` is {'neither a text nor a list of messages' if 'prompt' in row else 'missing'}")
    prompt = prompt if isinstance(prompt, str) else as_turns(prompt, "prompt")
    used = {"prompt", *(shape.fields if shape else ()), *(shape.reads if shape else ())}
    fields = {name: value for name, value in row.items() if name not in used and not OF_RESPONSES.search(name)}
    return Question(prompt, fields, shape.name if shape else "prompt")


def report(file, args, tokenizer):
    """Lines on what was read."""
    longest, first = max(len(prompt.ids) for prompt in file.prompts), repr(tokenizer.decode(file.prompts[0].ids))
    yield f"{args.prompts}: {len(file.prompts):,} prompts of {longest} tokens at most"
    for reason, count in file.left_out.items():
        yield f"  left out {count:,} rows because {reason}"
    if file.num_cut:
        yield f"  cut {file.num_cut:,} prompts to --max-prompt-length {args.max_prompt_length}"
    yield from file.notes
    yield f"  row 0  {first if len(first) <= 150 else f'{first[:60]} ... {first[-80:]}'}"
