"""The toy worlds by name: `toy`, which is all text, and `toy-vision`, which has pictures."""

from formats.row_files import DataError

FOLDERS = {"toy": "outputs/toy_world", "toy-vision": "outputs/toy_vision"}


def take(args, files):
    """Put files of a toy world, which is built if need be, in the place of flags that name one.  Raises DataError.

    files: {flag: its file there}.
    """
    for flag, file in files.items():
        if (world := getattr(args, flag)) in FOLDERS:
            if not (path := build(world) / file).exists():
                raise DataError(f"--{flag.replace('_', '-')} {world}: that world has no {file}: name a file of yours")
            setattr(args, flag, str(path))


def build(world):
    """The folder of a world."""
    if world == "toy":
        import toy_world as module
    else:
        import toy_vision as module
    return module.build(FOLDERS[world])
