"""What one would use instead: a pool of SentencePiece processes over parquet files, ids written to one .bin file.

`python tests/bench/pool.py SOURCE_FOLDER TOKENIZER OUT WORKERS`. As lean as such scripts get: row groups are the work,
ids travel as uint16 bytes, documents are framed by <s> and </s>; no order, no index, no hashes, no fsync.
"""

import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sentencepiece import SentencePieceProcessor

processor: SentencePieceProcessor


def start(tokenizer: str) -> None:
    global processor
    processor = SentencePieceProcessor(model_file=tokenizer)


def encode(work: tuple[str, int]) -> tuple[int, bytes]:
    path, group = work
    texts = pq.ParquetFile(path).read_row_group(group, columns=["text"], use_threads=False)["text"].to_pylist()
    documents = processor.encode(texts, add_bos=True, add_eos=True, num_threads=1)
    return len(documents), np.concatenate([np.array(ids, dtype=np.uint16) for ids in documents]).tobytes()


def main() -> None:
    source, tokenizer, out, workers = sys.argv[1:]
    began = time.perf_counter()
    work = [
        (str(path), group)
        for path in sorted(Path(source).glob("*.parquet"))
        for group in range(pq.ParquetFile(path).num_row_groups)
    ]
    tokens = 0
    with Path(out).open("wb") as file, multiprocessing.Pool(int(workers), start, (tokenizer,)) as pool:
        for _, data in pool.imap(encode, work):
            file.write(data)
            tokens += len(data) // 2
    print(f"{tokens} tokens, {tokens / (time.perf_counter() - began) / 1e6:.3f} M tokens/s once running")


if __name__ == "__main__":
    main()
