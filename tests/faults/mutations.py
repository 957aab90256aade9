"""One thing changed in a JSON value or in a text, as people and disks change them."""

import copy
import json

DEEP = "DEEP"  # stands for a list in a list, 2,000 times
JUNK = [
    None,
    True,
    False,
    0,
    -1,
    5,
    2.5,
    1e308,
    10**400,
    "",
    " ",
    "x",
    "1",
    "\x00",
    [],
    {},
    [1],
    [None],
    [[]],
    {"a": 1},
]
JUNK += [float("nan"), float("inf"), {"role": "user"}, DEEP]
ROLES = ["User", "human", "gpt", "Assistant", "asshstant", "bot", "", None, 5, ["user"], "user", "assistant", "system"]


def paths(value, path=()):
    """The paths of everything inside a JSON value, as keys and places."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from paths(part, (*path, key))


def mutated(value, draw):
    """(bytes of a JSON text, what was done): `value` with one thing changed; it is a dict with something in it."""
    value = copy.deepcopy(value)
    kind = draw.choice("junk junk junk role gone gone twice cut bit renamed more swapped".split())
    *above, last = draw.choice(list(paths(value)))
    place = value
    for key in above:
        place = place[key]
    if kind in ("twice", "cut", "bit"):
        text = json.dumps(value).encode()
        return {"twice": twice, "cut": cut, "bit": bit}[kind](text, value, draw), kind
    if kind == "junk":
        place[last] = draw.choice(JUNK)
    elif kind == "role":
        messages = [m for m in parts(value) if isinstance(m, dict) and m.keys() & {"role", "from"}]
        if messages:
            message = draw.choice(messages)
            message["role" if "role" in message else "from"] = draw.choice(ROLES)
    elif kind == "gone":
        del place[last]
    elif kind == "renamed" and isinstance(last, str):
        place[last + draw.choice(["s", "_", "2"])] = place.pop(last)
    elif kind == "more" and isinstance(place, dict):
        place[draw.choice(["id", "score", "weight", "n"])] = draw.choice([1, 2.5, None, "a1b2"])
    elif kind == "swapped":
        others = [key for key in (place if isinstance(place, dict) else range(len(place))) if key != last]
        if others:
            other = draw.choice(others)
            place[last], place[other] = place[other], place[last]
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 2000 + "]" * 2000)
    return text.encode(), f"{kind} at {'.'.join(map(str, (*above, last)))}"


def parts(value):
    """A JSON value and all that is inside it."""
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(part)


def twice(text, value, draw):
    """A key that stands twice, the second time with another value."""
    key = draw.choice(list(value))
    return text[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(['x', 1, value[key]]))}}}".encode()


def cut(text, value, draw):
    return text[: draw.randrange(1, len(text))]


def bit(text, value, draw):
    place = draw.randrange(len(text))
    return text[:place] + bytes([text[place] ^ (1 << draw.randrange(7))]) + text[place + 1 :]
