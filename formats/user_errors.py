"""What a user can mend, told in one sentence: what is wrong, where, what to do.  Exit code 2 (harness/endings.py)."""


class UserError(ValueError):
    """Its text is the sentence."""
