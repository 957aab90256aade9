"""What a user can mend, told in one sentence: what is wrong, where, what to do.  Exit code 2 (harness/endings.py)."""


class UserError(ValueError):
    """Its text is the sentence."""


NO_MEMORY = "out of memory", "not enough memory", "can't allocate memory"  # torch on GPUs, on Windows, on CPUs


def is_out_of_memory(error):
    """Whether an allocation failed: torch raises a RuntimeError for that."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
