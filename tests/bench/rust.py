"""The fastest route in Rust: gigatoken from parquet files to one .bin file of uint16 ids.

`python tests/bench/rust.py SOURCE_FOLDER TOKENIZER OUT WORKERS`. As lean as the pool beside it: no order, no index, no
hashes, no fsync; `<s>` and `</s>` are added a document. Needs the extra `bench`.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

BOS, EOS = 1, 2


def main() -> None:
    source, tokenizer, out, workers = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = workers
    import awkward
    import gigatoken

    began = time.perf_counter()
    encoder = gigatoken.Tokenizer.from_sentencepiece(tokenizer)
    ids = encoder.encode_files(gigatoken.ParquetFileSource(sorted(Path(source).glob("*.parquet"))), parallel=True)
    counts = awkward.to_numpy(awkward.num(ids))
    flat = awkward.to_numpy(awkward.flatten(ids)).astype(np.uint16)
    starts = np.cumsum(counts) - counts
    framed = np.empty(len(flat) + 2 * len(counts), dtype=np.uint16)
    place = 2 * np.arange(len(counts))
    inside = np.ones(len(framed), dtype=bool)
    inside[starts + place] = inside[starts + counts + place + 1] = False
    framed[inside] = flat
    framed[starts + place], framed[starts + counts + place + 1] = BOS, EOS
    framed.tofile(out)
    print(f"{len(framed)} tokens, {len(framed) / (time.perf_counter() - began) / 1e6:.3f} M tokens/s once running")


if __name__ == "__main__":
    main()
