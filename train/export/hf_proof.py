"""Whether Transformers says what our model says: its own code, on the files as they are on disk.

1. The tokenizer: hostile texts have the ids that training gave them, and decode alike.
2. The weights: nothing is missing or left over, the head is the embedding and not ternary, and what Transformers
   derives from them in fp32, codes and scales, is bitwise what we derive.
3. The arithmetic: in fp64 on both sides, all logits agree to LOGITS.
4. The use: in fp32, as people run it, the mean KL divergence from our distribution is below KL. A difference of logits
   would prove nothing there: an activation close to the middle of two 8-bit codes may round to either.

Transformers computes norms, codes and scales in fp32, whatever dtype a model has. For the third point its code runs as
it is, but casts of an fp64 tensor to fp32 are left out. It is never compiled here: a compiler need not be there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from train.export import tokenizer as tokenizer_files
from train.export.divergence import mean_divergence
from train.export.hf_weights import name_of
from train.export.source import Source
from train.model import Model, Projection
from train.samples import PROMPTS

LOGITS = 1e-10  # largest difference, fp64
KL = 1e-2  # nats, mean over positions, fp32; an untrained 95m has 2e-4
LENGTH = 256  # tokens compared, of each kind, at most


def prove(source: Source, out: Path, form: str) -> list[str]:
    """Compare the folder `out` with the model it was made from; a line a point. ValueError says what does not hold."""
    with quiet(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        return [tokenizer_holds(source, out), *model_holds(source, out, form)]


def model_holds(source: Source, out: Path, form: str) -> list[str]:
    """Points 2 to 4."""
    tokens = proof_tokens(source)
    theirs = load(out, torch.float32)
    weights, use = weights_hold(source, theirs, form), divergence_holds(source.model, theirs, tokens)
    del theirs  # 95m takes 0.8 GB more in fp64, on either side
    return [weights, logits_agree(widened(source.model, form), load(out, torch.float64), tokens), use]


def tokenizer_holds(source: Source, out: Path) -> str:
    from transformers import AutoTokenizer

    encoder: Any = AutoTokenizer.from_pretrained(out)
    texts = list(tokenizer_files.proof_texts(source.tokenizer))
    if found := tokenizer_files.differences(encoder, source.tokenizer, texts):
        raise ValueError(f"the exported tokenizer is not that of training: {found}")
    identity = source.tokenizer.identity
    if (encoder.bos_token_id, encoder.eos_token_id) != (identity.bos_id, identity.eos_id):
        raise ValueError("the exported tokenizer has other ids for the begin and the end of a document")
    return f"tokenizer: {len(texts):,} texts have the ids of training and decode alike"


def load(out: Path, dtype: torch.dtype) -> Any:
    """Transformers' model. ValueError when a tensor is missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, output_loading_info=True)
    model, info = loaded
    if odd := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise ValueError(f"the export does not load cleanly: {odd}")
    return model.eval()


def weights_hold(source: Source, theirs: Any, form: str) -> str:
    head, embedding = theirs.get_output_embeddings(), theirs.get_input_embeddings()
    if type(head) is not nn.Linear or head.weight is not embedding.weight:
        raise ValueError("the head of the export is not its embedding in full precision")
    if not torch.equal(embedding.weight, source.model.embedding):
        raise ValueError("the embedding of the export is another")
    matrices = list(source.model.projections())
    for matrix in matrices:
        if not computes_with(theirs.get_submodule(name_of(matrix)), matrix, form):
            raise ValueError(f"{name_of(matrix)} of the export has not the weights, codes or scale of the model")
    what = "the weights are" if form == "twin" else "codes and scales are"
    return f"weights: {len(matrices)} matrices, {what} bitwise ours; the head is the embedding"


def computes_with(module: Any, matrix: Projection, form: str) -> bool:
    """Whether a layer of Transformers multiplies, in fp32, by the very numbers of ours."""
    import transformers.integrations.bitnet as library

    bitnet: Any = library

    kind = {"latent": bitnet.AutoBitLinear, "packed": bitnet.BitLinear, "twin": nn.Linear}[form]
    if type(module) is not kind:
        return False
    if form == "twin":
        return torch.equal(module.weight, matrix.weight)
    assert matrix.codes is not None and matrix.scale is not None
    codes, inverse = matrix.codes.float(), 1 / matrix.scale
    if form == "latent":
        return torch.equal(bitnet.WeightQuant.apply(module.weight), codes / inverse)
    return torch.equal(bitnet.unpack_weights(module.weight, dtype=torch.float32), codes) and torch.equal(
        module.weight_scale, inverse
    )


def divergence_holds(model: Model, theirs: Any, tokens: list[Tensor]) -> str:
    found = torch.cat([theirs(ids).logits[0] for ids in tokens])
    mean = mean_divergence(torch.cat([model(ids)[0] for ids in tokens]), found)
    if not mean <= KL:
        raise ValueError(f"in fp32 the export is {mean:.2g} nats from the model in the mean, more than {KL:.0e}")
    return f"fp32 as it is used: mean KL divergence {mean:.1e} nats (bound {KL:.0e})"


def logits_agree(model: Model, theirs: Any, tokens: list[Tensor]) -> str:
    with Widened():
        largest = max((model(ids) - theirs(ids).logits).abs().max().item() for ids in tokens)
    if not largest <= LOGITS:
        raise ValueError(f"in fp64 the logits of the export and of the model differ by {largest:.2g}, not {LOGITS:.0e}")
    count = sum(ids.numel() for ids in tokens)
    return f"fp64 logits: largest difference {largest:.1e} over {count} tokens (bound {LOGITS:.0e})"


def widened(model: Model, form: str) -> Model:
    """The model in fp64. For codes that are stored, not derived by the reader, with the codes and scales of fp32."""
    wide = Model(model.config, torch.float64)
    wide.load_state_dict(model.state_dict())
    wide.double().requantize()
    if form == "packed":
        for ours, fp32 in zip(wide.bitlinears(), model.bitlinears(), strict=True):
            ours.codes, ours.scale = fp32.codes, 1 / (1 / fp32.scale).double()
    return wide


def proof_tokens(source: Source) -> list[Tensor]:
    """(1, T) int64 each: random ids, and text."""
    length = min(source.facts.sequence_length, LENGTH)
    generator = torch.Generator().manual_seed(0)
    identity = source.tokenizer.identity
    text = source.tokenizer.processor.encode(" ".join((*PROMPTS, *tokenizer_files.HOSTILE)))
    random = torch.randint(0, identity.vocab_size, (1, length), generator=generator)
    return [random, torch.tensor([[identity.bos_id, *text][:length]])]


class Widened(TorchFunctionMode):
    """Leave out casts of fp64 tensors to fp32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        narrows = function is Tensor.float or (function is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()))
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or remarks of Transformers, which would stand among our lines."""
    import transformers

    logging: Any = transformers.utils.logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
