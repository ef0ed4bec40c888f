"""Hugging Face's Rust tokenizers over parquet files, ids written to one .bin file.

`python tests/bench/hugging_face.py SOURCE_FOLDER TOKENIZER OUT WORKERS`. As lean as the pool beside it. The tokenizer
is the one that `train export --format hf` writes, since the one that Transformers converts has other ids.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]


def load(model: Path) -> Any:
    """The model as a tokenizers.Tokenizer that keeps a literal `</s>` as text and frames nothing."""
    sys.path.insert(0, str(ROOT))
    from tokenizers import Tokenizer

    from shared.tokenizer import load_tokenizer
    from train.export.tokenizer import tokenizer_json

    found = Tokenizer.from_str(json.dumps(tokenizer_json(load_tokenizer(model))))
    found.encode_special_tokens = True
    return found


def main() -> None:
    source, tokenizer, out, workers = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = workers
    began = time.perf_counter()
    encoder = load(Path(tokenizer))
    bos, eos = encoder.token_to_id("<s>"), encoder.token_to_id("</s>")
    tokens = 0
    with Path(out).open("wb") as file:
        for path in sorted(Path(source).glob("*.parquet")):
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(1024, columns=["text"]):
                    encoded = encoder.encode_batch_fast(batch["text"].to_pylist(), add_special_tokens=False)
                    ids = np.concatenate([np.array([bos, *one.ids, eos], dtype=np.uint16) for one in encoded])
                    file.write(ids.tobytes())
                    tokens += len(ids)
    print(f"{tokens} tokens, {tokens / (time.perf_counter() - began) / 1e6:.3f} M tokens/s once running")


if __name__ == "__main__":
    main()
