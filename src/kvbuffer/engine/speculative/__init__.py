"""Speculative decoding: guesses of the next tokens, checked by the model all in one step.

config.py     the option ``--speculative-config``
drafter.py    what every drafter is: Drafter, Draft
ngram.py      prompt lookup: what followed the last tokens when they came before
speculator.py the drafter at work: how much is proposed, and what became of it
"""
