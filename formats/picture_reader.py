"""Pictures in the prompts of rows: looked at in their headers, counted by their sizes, opened when a pair is packed.

    {"images": ["cat.png"], "prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."}

A picture is a file beside the data file, or bytes.  In messages it stands where {"type": "image"} or <image> stands;
without such a mark all stand in front of the first user's text.  The model's own processor makes of each a run of
placeholder tokens and pixels; how many tokens depends on its size alone, which the first bytes of a file tell.
"""

import base64
import hashlib
import io
import json
from typing import Any, NamedTuple

import torch

from formats import hub_files, row_pictures
from formats.row_files import Malformed, Unusable
from formats.row_pictures import WRITTEN
from formats.user_errors import UserError

MARK = "\ufffc"  # in the place of WRITTEN while a row is read: Unicode's "object replacement character"
PER_TOKEN = "mm_token_type_ids", "token_type_ids"  # of what a processor returns; the rest is about pixels
OF_POSITIONS = "mm_token_type_ids", "image_grid_thw"


class PictureError(UserError):
    """A picture that cannot be used: one sentence for the user."""


class Found(NamedTuple):
    """The pictures of a row."""

    sources: tuple  # path or bytes of each
    sizes: tuple  # (width, height) of each
    digests: tuple  # sha256 of the bytes of each


class Pictures(NamedTuple):
    """The pictures of a pair's prompt."""

    reader: Any  # PictureReader
    where: str  # file:line
    text: str  # the prompt, with one placeholder for each
    sources: tuple
    digests: tuple
    num_behind: int  # tokens at the end of the prompt's text that belong to the responses
    num_tokens: int  # of the prompt

    def open(self):
        """(prompt ids, {name: tensor} that the model takes beside them), on the CPU.  Raises PictureError."""
        return self.reader.open(self)


# -- rows ------------------------------------------------------------------------------------------------------------


class PictureReader:
    """Of a vision-language model: its processor, which is loaded at the first picture.

    args: of the command line, with model and trust_remote_code; config: of the model; tokenizer: the one that the run
    has, whose chat template then takes MARKs.
    """

    def __init__(self, args, config, tokenizer):
        self.path, self.tokenizer, self.trust_remote_code = args.model, tokenizer, args.trust_remote_code
        self.image_token = getattr(config, "image_token_id", None)
        self.positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.processor = self.Image = None
        self.more_tokens = {}  # sizes of the pictures of a prompt -> tokens beyond one for each
        self.opened = {}  # text, digests, num_behind of Pictures -> ids, and of what the processor made all but pixels
        take_parts(tokenizer)

    def take(self, row, source):
        """(the row without its pictures, Found), or (row, None) where it has none.  Raises Malformed, PictureError.

        source: of the rows; paths of pictures are relative to its folder.
        """
        row, given = row_pictures.take(row, MARK)
        if not given:
            return row, None
        self._load()
        found = [self._look(picture, source) for picture in given]
        return row, Found(*map(tuple, zip(*found)))

    def _load(self):
        """Raises PictureError where what reads pictures is not installed."""
        if self.processor:
            return
        try:
            from PIL import Image  # of the extra `vision`: rows of text need none of it
            from transformers import AutoProcessor

            options = {"trust_remote_code": self.trust_remote_code}
            processor = AutoProcessor.from_pretrained(hub_files.local(str(self.path)), **options)
            if not hasattr(processor, "image_processor"):  # it takes a tokenizer where a folder has nothing else
                raise ValueError("there is none")
        except Exception as error:  # of packages that are missing, or of a foreign folder: anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".:")
            raise PictureError(
                f"the pictures need {self.path}'s processor, which does not load ({reason}): install the extra with "
                "`bash setup.sh vision`, and see that the folder holds preprocessor_config.json"
            ) from None
        self.Image, self.processor = Image, processor
        self.tokenizer.chat_template = self.tokenizer.chat_template or self.processor.chat_template

    def _look(self, picture, source):
        """(path or bytes, size, digest) of a picture in a row.  Raises Malformed."""
        picture, data, name = row_pictures.read(picture, source)
        try:
            size = self.Image.open(io.BytesIO(data)).size  # of its header: nothing is decoded here
        except Exception as error:  # PIL on a broken header: anything
            is_none = isinstance(error, OSError) and type(error).__module__.startswith("PIL")
            reason = "it is none that Pillow knows" if is_none else f"{type(error).__name__}: {error}"
            raise Malformed(f"{name} cannot be read ({reason})") from None
        return picture, size, hashlib.sha256(data).hexdigest()

    def place(self, prompt, found):
        """Messages with a MARK where each picture stands.  Raises Malformed."""
        prompt = [message | {"content": message["content"].replace(WRITTEN, MARK)} for message in prompt]
        marks, number = sum(message["content"].count(MARK) for message in prompt), len(found.sources)
        row_pictures.check_places(marks, number)
        if not marks:
            user = next((message for message in prompt if message["role"] == "user"), None)
            if user is None:
                raise Malformed("its prompt has no message of a user for the pictures to stand in")
            user["content"] = MARK * number + user["content"]
        return prompt

    def seeing(self, pair, found, text, where, num_ids):
        """A pair of texts with its pictures: its prompt as long as it will be.  Raises Malformed, Unusable.

        text: of the prompt, which has num_ids tokens, some of them perhaps the responses'.
        """
        self._check_responses(pair)
        num_response = max(len(pair.chosen_ids), len(pair.rejected_ids))
        prompt_ids, pictures = self._seen(pair.prompt_ids, num_response, found, text, where, num_ids)
        return pair._replace(prompt_ids=prompt_ids, pictures=pictures)

    def _seen(self, prompt_ids, num_response, found, text, where, num_ids):
        """(prompt ids as long as they will be, Pictures).  Raises Malformed, Unusable."""
        more = self._more_tokens(text, found.sizes, num_ids)
        first = prompt_ids.index(self.image_token) if self.image_token in prompt_ids else 0
        longer = prompt_ids[:first] + [self.image_token] * more + prompt_ids[first:]
        if self.positions and len(longer) + num_response > self.positions:
            raise Unusable("with its pictures it is longer than the model has positions")
        num_behind = num_ids - len(prompt_ids)
        return longer, Pictures(self, where, text, found.sources, found.digests, num_behind, len(longer))

    def of_prompt(self, ids, found, text, where):
        """(ids of a prompt as long as it will be, its Pictures or None) from ids of its text.  As `seeing`."""
        if not found:
            self._check_prompt(ids)
            return ids, None
        return self._seen(ids, 0, found, text, where, len(ids))

    def written(self, prompt):
        """A text or messages with <image> in the place of each MARK."""
        if isinstance(prompt, str):
            return prompt.replace(MARK, WRITTEN)
        return [message | {"content": message["content"].replace(MARK, WRITTEN)} for message in prompt]

    def _check_responses(self, pair):
        """Raise Unusable for a response with the token that stands for a picture: there is none for it."""
        if self.image_token in pair.chosen_ids or self.image_token in pair.rejected_ids:
            raise Unusable("a response holds the token that stands for a picture")

    def check_text(self, pair):
        """The same for a pair without pictures, whose prompt must not hold it either."""
        self._check_responses(pair)
        self._check_prompt(pair.prompt_ids)

    def _check_prompt(self, prompt_ids):
        if self.image_token in prompt_ids:
            raise Unusable("its prompt holds the token that stands for a picture, and it has none")

    def _more_tokens(self, text, sizes, num_ids):
        """Tokens that the prompt has beyond num_ids, one for each picture.  Raises Malformed."""
        if sizes not in self.more_tokens:
            blank = [self.Image.new("RGB", size) for size in sizes]
            try:
                ids = self.processor(text=[text], images=[blank], add_special_tokens=False)["input_ids"][0]
            except Exception as error:
                raise Malformed(f"the processor refuses its pictures ({_first_line(error)})") from None
            self.more_tokens[sizes] = len(ids) - num_ids
        return self.more_tokens[sizes]

    def fingerprint(self):
        """sha256 of what decides on the pixels beside the bytes of a picture: class and settings of the processor."""
        of_images = self.processor.image_processor
        settings = of_images.to_dict() | {"class": type(of_images).__name__}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def data_uri(self, source, side=256):
        """A picture as a page shows it, at most so many pixels wide and high."""
        image = self.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
        image.thumbnail((side, side))
        image.save(file := io.BytesIO(), "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def save(self, folder):
        """Write the processor, if it was asked for, beside what else is saved."""
        if self.processor:
            self.processor.save_pretrained(folder)

    # -- packing -----------------------------------------------------------------------------------------------------

    def open(self, pictures):
        """Pictures.open.  A second time nothing is decoded until somebody asks for pixels."""
        key = pictures.text, pictures.digests, pictures.num_behind
        if key in self.opened:
            ids, small = self.opened[key]
            return ids.tolist(), Given(small, lambda: self._process(pictures)[1])
        ids, made = self._process(pictures)
        small = {name: tensor for name, tensor in made.items() if name in (*PER_TOKEN, *OF_POSITIONS)}
        self.opened[key] = torch.tensor(ids, dtype=torch.int32), small
        return ids, made

    def _process(self, pictures):
        """(prompt ids, {name: tensor}) by the processor."""
        try:
            opened = [
                self.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
                for source in pictures.sources
            ]
            given = self.processor(text=[pictures.text], images=[opened], add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # a broken file can make Pillow raise anything
            raise PictureError(
                f"{pictures.where}: a picture breaks when it is decoded ({_first_line(error)}): replace the file, or "
                "remove the row"
            ) from None
        given = dict(given)
        ids = given.pop("input_ids")[0].tolist()
        ids = ids[: len(ids) - pictures.num_behind]
        given.pop("attention_mask", None)
        if len(ids) != pictures.num_tokens:
            raise PictureError(
                f"{pictures.where}: its prompt has {len(ids)} tokens, and by the sizes of its pictures it has "
                f"{pictures.num_tokens}: has a file changed?"
            )
        return ids, {name: tensor[:, : len(ids)] if name in PER_TOKEN else tensor for name, tensor in given.items()}


class Given(dict):
    """What a processor has made of the pictures of a prompt, {name: tensor}, but for pixels: those `make()` makes."""

    def __init__(self, small, make):
        super().__init__(small)
        self.make = make


def with_pixels(given):
    """All that a processor makes of the pictures of a prompt, {name: tensor}."""
    return given.make() if isinstance(given, Given) else given


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def take_parts(tokenizer):
    """Have a tokenizer's chat template given messages as parts, {"type": "image"} in the place of each MARK, where one
    stands in them or where the template takes no strings: those of many vision-language models drop them.
    """
    own = tokenizer.apply_chat_template

    def apply(messages, **options):
        template = options.get("chat_template") or tokenizer.chat_template
        in_parts = any(MARK in message["content"] for message in messages) or drops_strings(template)
        if in_parts:
            messages = [message | {"content": parts_of(message["content"])} for message in messages]
        return own(messages, **options)

    known = {}

    def drops_strings(template):
        if template not in known:
            known[template] = False
            for content in ("word", [{"type": "text", "text": "word"}]):
                try:
                    said = own([{"role": "user", "content": content}], chat_template=template, tokenize=False)
                except Exception:  # a template is a program
                    said = ""
                if "word" in said:
                    known[template] = isinstance(content, list)
                    break
        return known[template]

    tokenizer.apply_chat_template = apply


def parts_of(content):
    """A text with MARKs as parts of a message."""
    parts = []
    for place, text in enumerate(content.split(MARK)):
        if place:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
