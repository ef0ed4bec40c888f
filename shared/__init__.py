"""What both stages need, and nothing else: the contract on disk, durability, the permutation, the tokenizer."""
