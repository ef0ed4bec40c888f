"""Evaluation: the numbers are what their names say, on the validation split alone, in the run and after it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.manifest import load_manifest, open_stream
from shared.shards import TokenStream
from shared.tokenizer import Tokenizer, load_tokenizer, piece_bytes
from tests.train.command import Command
from tests.train.dataset import build
from tests.train.same_bytes import contents
from train.config import ModelConfig
from train.evaluate import Evaluation, evaluate, text_bytes
from train.metrics import read
from train.model import Model

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data / "tokenizer.model")


@pytest.fixture(scope="module")
def stream(data: Path) -> TokenStream:
    return open_stream(data, load_manifest(data), "val")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    made = Model(ModelConfig(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab_size=1000))
    made.initialise(0)
    return made


def test_the_loss_is_the_mean_over_all_labels(model: Model, stream: TokenStream, tokenizer: Tokenizer) -> None:
    found = evaluate(model, stream, tokenizer, sequences=10, length=LENGTH, micro=4)  # 4 + 4 + 2
    assert found is not None
    nats = []
    for i in range(10):
        tokens = torch.from_numpy(stream[i * LENGTH : i * LENGTH + LENGTH + 1].astype(np.int64))
        logits = model(tokens[None, :-1])[0].double()
        nats += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").tolist()
    assert found.tokens == len(nats) == 10 * LENGTH
    assert found.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
    assert found.perplexity == math.exp(found.loss)
    assert found.bits_per_byte == pytest.approx(math.fsum(nats) / math.log(2) / found.utf8_bytes, rel=1e-6)


def test_over_the_whole_split_the_bytes_are_the_manifests(
    data: Path, stream: TokenStream, tokenizer: Tokenizer
) -> None:
    split = load_manifest(data).splits["val"]
    assert text_bytes(stream, tokenizer, split.sequences * LENGTH) == split.utf8_bytes


@pytest.mark.parametrize(
    "text", ["Hello, world", "  two  spaces ", "\n\n", "naïve 中文 \U0001f600", "a", "</s> <0x41>"]
)
def test_the_bytes_of_whole_documents_are_those_of_their_text(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    ids = [1, *tokenizer.processor.encode(text), 2, 1, *tokenizer.processor.encode("More"), 2]

    class Stream(TokenStream):
        def __init__(self) -> None: ...
        def __getitem__(self, span: slice) -> np.ndarray:
            return np.array(ids, dtype=np.uint16)[span]

    assert text_bytes(Stream(), tokenizer, len(ids) - 1) == len(text.encode()) + len("More")


def test_a_byte_piece_counts_one_and_a_control_piece_none(tokenizer: Tokenizer) -> None:
    sizes = piece_bytes(tokenizer.processor)
    assert [sizes[i] for i in (0, 1, 2)] == [0, 0, 0]
    assert sizes[tokenizer.processor.piece_to_id("<0x0A>")] == 1


@given(st.integers(0, 3))
def test_an_evaluation_is_left_before_the_batch_at_which_it_is_told_to(
    model: Model, stream: TokenStream, tokenizer: Tokenizer, batches: int
) -> None:
    asked = iter([False] * batches + [True] * 9)
    found = evaluate(model, stream, tokenizer, sequences=10, length=LENGTH, micro=4, left=lambda: next(asked))
    assert (found is None) == (batches < 3)
    assert len(list(asked)) == 9 - (batches < 3)


def test_evaluating_leaves_weights_codes_gradients_and_random_state_alone(
    model: Model, stream: TokenStream, tokenizer: Tokenizer
) -> None:
    def state() -> list[torch.Tensor]:
        return [*model.parameters(), *(layer.codes for layer in model.bitlinears()), torch.get_rng_state()]

    before = [tensor.clone() for tensor in state()]
    evaluate(model, stream, tokenizer, sequences=3, length=LENGTH, micro=2)
    assert all(a.equal(b) for a, b in zip(before, state(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    model.assert_fresh()


def test_a_loss_beyond_all_bounds_is_still_a_number() -> None:
    assert Evaluation(1, 32, 100, 1e6).perplexity == math.inf
    assert math.isnan(Evaluation(1, 32, 0, 5.0).bits_per_byte)


# -- through the command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(train: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "run"
    assert train.run(data, path, "--steps", 4, settings={"eval.sequences": 6}).code == 0
    return path


def test_eval_prints_and_keeps_what_the_run_has_measured(train: Command, run: Path) -> None:
    (line,) = [line for line in read(run / "metrics.jsonl") if line["kind"] == "eval"]
    before = contents(run)
    done = train("eval", run, "--sequences", 6, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert list(found) == ["split", "step", "sequences", "tokens", "loss", "perplexity", "bits_per_byte"]
    assert (found["split"], found["step"], found["sequences"], found["tokens"]) == ("val", 4, 6, 6 * LENGTH)
    assert (found["loss"], found["bits_per_byte"]) == (line["val_loss"], line["val_bits_per_byte"])
    after = contents(run)
    assert json.loads(after.pop("evals/step-4.json")) == found
    assert after == before, "evaluating changes nothing else under the run"


def test_eval_takes_the_whole_split_and_says_the_loss_plainly(train: Command, data: Path, run: Path) -> None:
    done = train("eval", run)
    assert done.code == 0
    lines = dict(line.split(" ", 1) for line in done.out.splitlines())
    assert lines["sequences"] == "10"
    assert float(lines["loss"]) == json.loads((run / "evals" / "step-4.json").read_text())["loss"]
    bytes_in_all = load_manifest(data).splits["val"].utf8_bytes
    assert float(lines["bits_per_byte"]) == pytest.approx(
        float(lines["loss"]) * 10 * LENGTH / math.log(2) / bytes_in_all
    )


def test_eval_refuses_what_is_not_the_runs_data_set(train: Command, data: Path, run: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", train=4, val=4, seed=5)
    done = train("eval", run, "--data", other)
    assert done.code == 1
    assert load_manifest(other).id in done.err and "--data" in done.err
    done = train("eval", run, "--data", tmp_path / "gone")
    assert done.code == 1
    assert "is not there" in done.err
    done = train("eval", run, "--sequences", 11)
    assert done.code == 1
    assert "has 10 sequences" in done.err


def test_eval_reads_the_validation_split_only(train: Command, run: Path) -> None:
    assert train("eval", run, "--json", faults=[("only_val",)]).code == 0
