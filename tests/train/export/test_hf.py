"""Transformers says what the model says, and an export that would not is refused with nothing left behind."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.command import Command
from tests.train.export.exported import FORMS, Exports
from train.export import command, hf, hf_proof
from train.export.source import open_source
from train.generate import generate

pytest.importorskip("transformers", reason="the extra hf is not installed")
pytest.importorskip("accelerate", reason="the extra hf is not installed")

FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_the_proof_runs() -> Iterator[None]:
    torch.set_num_threads(1)
    with hf_proof.quiet(), torch.compiler.set_stance("force_eager"):
        yield


def test_the_command_writes_a_folder_and_says_what_it_proved(train: Command, bitnet_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "export"
    done = train("export", bitnet_run, "--format", "hf", "--out", out, "--variant", "packed")
    assert (done.code, done.err) == (0, "")
    assert [line.split(":")[0] for line in done.out.splitlines()] == [
        "tokenizer", "weights", "fp64 logits", "fp32 as it is used",
    ]  # fmt: skip
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["export"], "no lock and nothing partial"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_model(exports: Exports, form: str) -> None:
    proven = hf.prove(exports.source(form), exports.path(form), exports.options(form))
    assert len(proven) == 4
    tensors = load_file(exports.path(form) / "model.safetensors")
    assert not [name for name in tensors if "lm_head" in name]
    assert {path.name for path in exports.path(form).iterdir()} == FILES, "safetensors only"


def test_packed_codes_take_two_bits(exports: Exports) -> None:
    model = exports.source("packed").model
    tensors = load_file(exports.path("packed") / "model.safetensors")
    codes = [tensor for tensor in tensors.values() if tensor.dtype == torch.uint8]
    assert sum(tensor.nbytes for tensor in codes) == sum(layer.weight.numel() for layer in model.bitlinears()) / 4
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale")}
    assert len(scales) == len(codes) == 7 * model.config.layers
    assert {(tuple(scale.shape), scale.dtype) for scale in scales.values()} == {((1,), torch.float32)}


# Faults planted into a good export. Each takes the folder's config.json and tensors, and changes them.
Fault = Callable[[dict[str, Any], dict[str, Tensor]], None]
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def wrong_epsilon(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["rms_norm_eps"] = 1e-6


def wrong_rotation(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["rope_theta"], config["rope_parameters"]


def squared_relu(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["hidden_act"]


def swapped_gate_and_up(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for end in ("", "_scale"):
        if GATE + end in tensors:
            tensors[GATE + end], tensors[UP + end] = tensors[UP + end], tensors[GATE + end]


def swapped_norms(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    a, b = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def inverted_scale(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = 1 / tensors[name]


def mean_of_the_fused_matrix(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    scales = [f"model.layers.0.self_attn.{part}_proj.weight_scale" for part in "qkv"]
    mean = torch.stack([tensors[name] for name in scales]).mean(0)
    tensors.update({name: mean.clone() for name in scales})


def baked_weights_quantised_again(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            inverse = 1 / tensor.abs().mean()
            tensors[name] = (tensor * inverse).round().clamp(-1, 1) / inverse


def nothing_is_quantised(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["quantization_config"]


def ternary_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["modules_to_not_convert"] = []
    config["tie_word_embeddings"] = False
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def untied_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = False
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def another_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    untied_head(config, tensors)
    tensors["lm_head.weight"] += 1e-6


def half_precision(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.bfloat16()


def learnt_sub_norm(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.ffn_sub_norm.weight"] *= 1 + 1e-6


def left_out(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def left_over(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)


EVERYWHERE = (
    wrong_epsilon, wrong_rotation, squared_relu, swapped_gate_and_up, swapped_norms, another_head, half_precision,
    learnt_sub_norm,
)  # fmt: skip
CHANGE_LOGITS = [(form, fault) for form in FORMS for fault in EVERYWHERE] + [
    ("packed", inverted_scale),
    ("packed", mean_of_the_fused_matrix),
    ("latent", baked_weights_quantised_again),
    ("latent", nothing_is_quantised),
    ("latent", ternary_head),
]
KEEP_LOGITS = [("latent", untied_head), ("twin", untied_head), ("packed", left_over), ("latent", left_out)]


def planted(exports: Exports, form: str, fault: Fault, out: Path) -> Path:
    shutil.copytree(exports.path(form), out)
    config, tensors = json.loads((out / "config.json").read_bytes()), load_file(out / "model.safetensors")
    fault(config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


@pytest.mark.parametrize(("form", "fault"), CHANGE_LOGITS + KEEP_LOGITS)
def test_a_planted_fault_makes_the_proof_fail(exports: Exports, tmp_path: Path, form: str, fault: Fault) -> None:
    source, out = exports.source(form), planted(exports, form, fault, tmp_path / "out")
    with pytest.raises(ValueError, match=r"of the export|the export does"), torch.no_grad():
        hf_proof.model_holds(source, out, form)


@pytest.mark.parametrize(("form", "fault"), CHANGE_LOGITS)
def test_the_logits_alone_show_every_fault_that_changes_them(
    exports: Exports, tmp_path: Path, form: str, fault: Fault
) -> None:
    source, out = exports.source(form), planted(exports, form, fault, tmp_path / "out")
    theirs, ours = hf_proof.load(out, torch.float64), hf_proof.widened(source.model, form)
    with pytest.raises(ValueError, match="in fp64 the logits"), torch.no_grad():
        hf_proof.logits_agree(ours, theirs, hf_proof.proof_tokens(source))


def test_a_tokenizer_of_other_ids_makes_the_proof_fail(exports: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exports.path("latent"), out)
    config = json.loads((out / "tokenizer_config.json").read_bytes())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": False}))
    with pytest.raises(ValueError, match="the exported tokenizer is not that of training: the ids of '<s>'"):
        hf.prove(exports.source("latent"), out, exports.options("latent"))


def test_a_model_that_is_far_away_in_use_makes_the_proof_fail(exports: Exports) -> None:
    source, theirs = exports.source("latent"), hf_proof.load(exports.path("latent"), torch.float32)
    tokens = hf_proof.proof_tokens(source)
    with torch.no_grad():
        assert "mean KL divergence" in hf_proof.divergence_holds(source.model, theirs, tokens)
        theirs.model.norm.weight *= 1.5
        with pytest.raises(ValueError, match="in fp32 the export is"):
            hf_proof.divergence_holds(source.model, theirs, tokens)


def test_a_failed_proof_leaves_nothing_behind(
    bitnet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hf.config_json
    monkeypatch.setattr(hf, "config_json", lambda *a: {**real(*a), "hidden_act": "relu2"})
    with pytest.raises(ValueError, match="fp64 the logits"):
        command.export(bitnet_run, "hf", tmp_path / "out", None, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_cut_short_leaves_nothing_behind(
    bitnet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def card(*_: object) -> str:
        raise error

    monkeypatch.setattr(hf, "model_card", card)
    with pytest.raises(type(error)):
        command.export(bitnet_run, "hf", tmp_path / "out", None, print)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_cleared_away(bitnet_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("of a file")
    (tmp_path / "out").mkdir()  # an empty folder is nobody's
    command.export(bitnet_run, "hf", tmp_path / "out", None, print)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("form", FORMS)
def test_both_generate_the_same(exports: Exports, form: str) -> None:
    """Through Transformers' own cache and loop, in fp64 as the proof: the likeliest 20 ids are equal."""
    source = exports.source(form)
    theirs, prompt = hf_proof.load(exports.path(form), torch.float64), [1, 300, 17, 85]
    with torch.no_grad(), hf_proof.Widened():
        got = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=-1)
        model, rng = hf_proof.widened(source.model, form), torch.Generator()
        want = generate(model, prompt, 20, length=32, temperature=0.0, top_p=1.0, generator=rng)
    assert got[0].tolist() == prompt + want


def test_generation_ends_at_the_end_of_a_document(exports: Exports) -> None:
    theirs, prompt = hf_proof.load(exports.path("latent"), torch.float32), torch.tensor([[1, 300, 17, 85]])
    with torch.no_grad():
        last = theirs(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        theirs.get_input_embeddings().weight[2] = last * 1e3  # </s> is now by far the likeliest
        got = theirs.generate(prompt, max_new_tokens=10)
    assert got[0].tolist() == [*prompt[0].tolist(), 2]


def test_a_latent_export_can_be_trained_further(exports: Exports) -> None:
    theirs = hf_proof.load(exports.path("latent"), torch.float32).train()
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        q = theirs.model.layers[0].self_attn.q_proj.weight
        assert q.grad is not None and q.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_card_says_where_the_model_comes_from(exports: Exports) -> None:
    for form in FORMS:
        source, card = exports.source(form), (exports.path(form) / "README.md").read_text()
        for fact in (source.facts.data_id, source.provenance["commit"], "| 6 of 24 |", "| updates", "| run |"):
            assert str(fact) in card
        assert f"{source.provenance['losses']['train_loss']:.4f}" in card
        assert "validation loss at update 4" in card


def test_a_run_in_progress_gives_its_newest_checkpoint_that_verifies(bitnet_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bitnet_run, run)
    damaged = run / "checkpoints" / "step-00000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    said: list[str] = []
    source = open_source(run, said.append)
    assert source.step == 5 and "step-00000006 is damaged" in said[0]
    assert source.provenance["tokens"] == 5 * 4 * 32
    assert open_source(bitnet_run, said.append).step == 6


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["RUN", "--format", "hf", "--out", "foreign"], "foreign: is there already"),
        (["RUN", "--format", "hf", "--out", "new", "--variant", "f16"], "--format hf can be latent or packed"),
        (["TWIN", "--format", "hf", "--out", "new", "--variant", "packed"], "full-precision twin and has no codes"),
        (["empty", "--format", "hf", "--out", "new"], "no run here"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    train: Command,
    bitnet_run: Path,
    twin_run: Path,
    tmp_path: Path,
    args: list[str],
    error: str,
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine").write_text("precious")
    places = {"RUN": bitnet_run, "TWIN": twin_run} | {name: tmp_path / name for name in ("foreign", "new", "empty")}
    done = train("export", *(places.get(arg, arg) for arg in args))
    assert done.code == 1 and done.out == ""
    assert error in done.err and len(done.err.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["foreign", "mine"]


def test_a_missing_package_is_named_with_its_extra(
    bitnet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(ValueError, match=r"needs the package accelerate.*pip install '.\[hf\]'"):
        command.export(bitnet_run, "hf", tmp_path / "out", None, print)


def test_rows_that_do_not_fill_bytes_are_not_packed(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    source = exports.source("packed")
    monkeypatch.setattr(source.model.bitlinears()[0], "segments", (16, 6, 6))
    with pytest.raises(ValueError, match="four rows go into a byte"):
        hf.form_of(source, exports.options("packed"))
    assert hf.form_of(source, exports.options("latent")) == "latent"
