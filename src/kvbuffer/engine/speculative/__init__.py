"""Speculative decoding: guesses of the next tokens, checked by the model all in one step.

config.py     the option ``--speculative-config``
drafter.py    what every drafter is: Drafter, Draft
methods.py    the drafters by name
ngram.py      prompt lookup: what followed the last tokens when they came before
suffix.py     suffix decoding: what followed them most often, in earlier outputs, too; on suffix_automaton.py
mtp.py        the model's own multi-token-prediction head
draft_model.py  a separate, smaller model
lengths.py    how much is asked for: what pays, by what was accepted and what steps cost
speculator.py the drafter at work, and what became of its drafts
"""
