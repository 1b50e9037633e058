"""What the answer to an instruction depends on, and the instruction itself in its normal form."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbuffer.tokenizer import Tokenizer

#: Answers are the model's likeliest tokens; what a sampled answer would be nobody can predict.
SAMPLING = "greedy"
_DIGEST_BYTES = 16
# Files besides the configuration and the weights that decide what a checkpoint answers.
_FILES = ("generation_config.json", "tokenizer.json")
# Rendered to see whether two templates, with their tokenizers, make the same prompt.
_PROBE = "What is 12 + 30?\n  Où, 你好 🙂"


def normalise(instruction: str) -> str:
    """Return the form under which an instruction is stored and looked up.

    Only what cannot change its meaning is undone: how accents are composed (NFC), how lines end, white space around it.
    """
    if not instruction.isascii():
        instruction = unicodedata.normalize("NFC", instruction)
    if "\r" in instruction:
        instruction = instruction.replace("\r\n", "\n").replace("\r", "\n")
    return instruction.strip()


@dataclass(frozen=True)
class Identity:
    """What the answers of a store depend on besides the instructions.

    Attributes:
        model: fingerprint of the checkpoint: its revision, whatever it is called.
        template: digest of a rendered conversation.
        system_prompt: text of the system message before the instruction; None without one.
        plan: which layers are computed at once (:attr:`kvbuffer.cqil.plan.CqilPlan.identity`); empty for none.
        sampling: how the tokens were chosen.
    """

    model: str
    template: str
    system_prompt: str | None = None
    plan: str = ""
    sampling: str = SAMPLING

    @classmethod
    def of(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        plan: str = "",
    ) -> Identity:
        """Return the identity of what a server with these settings answers.

        Args:
            folder: the checkpoint.
            tokenizer: its tokenizer.
            system_prompt: as in the attributes.
            chat_template: Jinja source that replaces the checkpoint's own template.
            plan: as in the attributes.

        Raises:
            InvalidRequestError: there is no chat template, or it refuses the system message.
        """
        probe = tokenizer.apply_chat_template(conversation(_PROBE, system_prompt), **template_options(chat_template))
        template = blake2b(json.dumps(probe).encode(), digest_size=_DIGEST_BYTES).hexdigest()
        return cls(_fingerprint(folder), template, system_prompt, plan)

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for all of it."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=_DIGEST_BYTES).digest()

    def differences(self, other: Identity) -> list[str]:
        """Return the names of what differs, for people."""
        mine, theirs = asdict(self), asdict(other)
        return [name.replace("_", " ") for name in mine if mine[name] != theirs[name]]


class Keys:
    """Makes the keys of one identity: 128-bit hashes of an instruction and all that its answer depends on."""

    def __init__(self, identity: Identity) -> None:
        self._hash = blake2b(digest_size=_DIGEST_BYTES, key=identity.digest)

    def __call__(self, instruction: bytes) -> bytes:
        """Return the key of a normalised instruction in UTF-8."""
        digest = self._hash.copy()
        digest.update(instruction)
        return digest.digest()


def conversation(instruction: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """Return the messages of a first turn."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": instruction}]


def template_options(chat_template: str | None) -> dict[str, Any]:
    """Return the options that make ``Tokenizer.apply_chat_template`` use a template of one's own, if there is one."""
    return {} if chat_template is None else {"chat_template": chat_template}


def _fingerprint(folder: Path) -> str:
    """Identify a checkpoint by its contents alone, so that copies of it on other machines are the same."""
    from kvbuffer.cache.disk.identity import checkpoint_id  # brings PyTorch, which readers of a store do without

    digest = blake2b(checkpoint_id(folder).encode(), digest_size=_DIGEST_BYTES)
    for name in _FILES:
        path = folder / name
        digest.update(f"{name} ".encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()
