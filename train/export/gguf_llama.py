"""llama.cpp, asked for its logits and ids in a process of its own: it aborts where it finds a fault, and that must not
take the export along.

    python gguf_llama.py FILE RESULT < {"tokens": [[1, …], …], "texts": ["…", …]}

writes logits, (sum of lengths, V) fp32, and ids to the npz file RESULT. Sequences are evaluated one by one, from
position 0, keys and values kept in fp32; texts are encoded without `<s>`, and a special token's name in one is text.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt


def installed() -> bool:
    return find_spec("llama_cpp") is not None


def ask(
    file: Path, tokens: Sequence[Sequence[int]], texts: Sequence[str]
) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    """Logits of the sequences of `tokens`, end to end, and the ids of `texts`. ValueError when llama.cpp fails."""
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.npz"
        # -P: beside this file lies gguf.py, which is not the package of that name
        command = [sys.executable, "-P", __file__, str(file), str(result)]
        question = json.dumps({"tokens": [list(map(int, ids)) for ids in tokens], "texts": list(texts)})
        done = subprocess.run(command, input=question, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise ValueError(f"{file}: llama.cpp does not take this file (exit {done.returncode}): {said}")
        with np.load(result) as found:
            ids, ends = found["ids"].tolist(), np.cumsum(found["lengths"]).tolist()
            logits = found["logits"]
    return logits, [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def answer(file: str, result: str) -> None:
    from llama_cpp import GGML_TYPE_F32, Llama

    question = json.load(sys.stdin)
    longest = max(map(len, question["tokens"]))
    llama = Llama(
        file,
        n_ctx=longest,
        n_batch=longest,
        n_threads=1,  # several would wait for each other on a busy machine
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    logits = []
    for tokens in question["tokens"]:
        llama.reset()
        llama.eval(tokens)
        logits.append(llama.scores[: len(tokens)].copy())
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in question["texts"]]
    np.savez(
        result,
        logits=np.concatenate(logits),
        ids=np.array([i for part in ids for i in part], dtype=np.int64),
        lengths=np.array([len(part) for part in ids], dtype=np.int64),
    )


if __name__ == "__main__":
    answer(*sys.argv[1:])
