"""What `prep tokenize` and `prep plan` read when nothing else is named."""

SOURCE = "hf://HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9?config=sample-10BT"
# LLaMA-2's tokenizer, in a repository that asks for no agreement. Its branch may move, these bytes may not.
TOKENIZER = "hf://TinyLlama/TinyLlama-1.1B-Chat-v1.0/tokenizer.model"
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


def pinned_sha256(tokenizer: str) -> str | None:
    """The sha256 that the tokenizer must have; None leaves it to the user's choice of another."""
    return TOKENIZER_SHA256 if tokenizer == TOKENIZER else None
