"""Defaults and choices of training options, apart from what is slow to import: the command line shows them."""

METHODS = ("scratch", "v-cycle", "v-cycle-3", "stack", "late-expansion", "small-first")
METHOD = "small-first"
STEPS = 2000
BATCH_SIZE = 16
SEQ_LEN = 256
OPTIMIZER = "muon"
LR = 3e-3
WEIGHT_DECAY = 0.1
CLIP = 1.0
WARMUP = 50
REWARM = 50
DECAY = 0.3
ALPHA = 0.25
FIRST_SHARE = 0.1
SMALL_SHARE = 0.5
SAVE_EVERY = 200
SAVEPOINT_EVERY = 20
EVAL_EVERY = 100
EVAL_SEQUENCES = 64
MTP_STEPS = 400
MTP_DRAFTS = 3
VOCAB_SIZE = 4096
HELD_OUT = 0.02
PATTERNS = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl")

#: Options with a fixed set of values.
CHOICES = {
    "method": METHODS,
    "optimizer": ("muon", "adamw"),
    "precision": ("float32", "bfloat16"),
    "optimizer_state": ("reset", "keep"),
    "pairing": ("adjacent", "stacked"),
}
