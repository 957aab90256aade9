"""A reward by rule: courteous, brief answers.  `generate.py --reward-fn scripts/reward_polite.py:polite` calls it.

Any function(prompt, response) -> number will do: a check of a sum, a unit test, the score of another model.
"""

import re

COURTESY = re.compile(r"\b(thank|thanks|please|kindly|dear|welcome|gladly|grateful|happy to|hope this)\b")


def polite(prompt, response):
    """1 for a courteous answer of at most 15 words, 0.5 for a longer one, 0 without a courteous word."""
    words = re.findall(r"[a-z0-9']+", response.lower())
    return (1.0 if len(words) <= 15 else 0.5) if COURTESY.search(" ".join(words)) else 0.0
