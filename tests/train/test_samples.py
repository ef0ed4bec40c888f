"""Sampling: fixed prompts, the same noise at every step, nothing of the run touched."""

from pathlib import Path

import pytest
import torch

from shared.tokenizer import Tokenizer, load_tokenizer
from tests.train.command import Command
from train.config import ModelConfig
from train.metrics import Log
from train.model import Model
from train.samples import PROMPTS, last_complete, sample_records


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data / "tokenizer.model")


def made(seed: int) -> Model:
    torch.set_num_threads(1)
    model = Model(ModelConfig(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab_size=1000))
    model.initialise(seed)
    return model


def test_samples_depend_on_the_weights_and_the_seed_and_on_nothing_else(tokenizer: Tokenizer) -> None:
    def texts(weights: int, seed: int, step: int) -> list[str]:
        torch.rand(3)  # the global generator moves on between
        return [line["text"] for line in sample_records(made(weights), tokenizer, step=step, length=48, seed=seed)]

    first = texts(0, 0, 1)
    assert len(first) == len(PROMPTS)
    assert texts(0, 0, 2) == first
    assert texts(1, 0, 1) != first
    assert texts(0, 9, 1) != first


def test_sampling_leaves_the_random_state_and_the_weights_alone(tokenizer: Tokenizer) -> None:
    model = made(0)
    before = [p.clone() for p in model.parameters()], torch.get_rng_state()
    list(sample_records(model, tokenizer, step=1, length=48, seed=0))
    assert all(a.equal(b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert torch.get_rng_state().equal(before[1])
    model.assert_fresh()


def test_a_diverged_model_has_no_texts_and_stops_nothing(tokenizer: Tokenizer) -> None:
    model = made(0)
    with torch.no_grad():
        model.embedding.fill_(torch.nan)
    assert [line["text"] for line in sample_records(model, tokenizer, step=1, length=48, seed=0)] == [None] * len(
        PROMPTS
    )


def test_samples_of_a_step_count_only_when_all_are_there(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    log = Log(path)
    for step, prompts in ((10, PROMPTS), (20, PROMPTS), (30, PROMPTS[:-1])):
        for prompt in prompts:
            log.append({"step": step, "prompt": prompt, "text": ""})
    log.close()
    assert [last_complete(path, step) for step in (5, 10, 25, 40)] == [0, 10, 20, 20]


def test_sample_continues_the_prompt_and_a_seed_repeats_it(train: Command, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(data, run, "--steps", 2).code == 0
    ask = ("sample", run, "--prompt", "The pulley", "--tokens", 12)
    texts = [train(*ask, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0].startswith("The pulley")
    assert texts[0] == texts[1] != texts[2]
    steering = train("sample", run, "--prompt", "a\x1b[2Jb", "--tokens", 1, "--seed", 1).out
    assert steering.startswith("a\\u001b[2Jb"), "what a terminal would obey is shown instead"
    greedy = [train(*ask, "--temperature", 0).out for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert len({train(*ask).out for _ in range(3)}) > 1, "without a seed each call draws anew"
    done = train("sample", run, "--prompt", "word " * 40)
    assert done.code == 1
    assert "the model takes 1 to 31" in done.err
