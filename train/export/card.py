"""The model card: README.md of a Transformers export, with where the model comes from and how it is loaded."""

from train.export.source import Source

FORMS = {
    "latent": "fp32 weights that Transformers quantises as it computes (`autobitlinear`, online): it can be trained on",
    "packed": "2-bit codes with one fp32 scale a projection (`bitlinear`, offline); embeddings in fp32; for inference",
    "twin": "a full-precision twin of a BitNet model: nothing is quantised",
}


def model_card(source: Source, form: str) -> str:
    """Markdown with the metadata that model hubs read."""
    found, quantization = source.provenance, "none" if form == "twin" else "bitnet"
    losses = found["losses"]
    facts = [
        ("run", found["run"]),
        ("updates", f"{found['step']:,} of {found['steps_planned']:,}"),
        ("tokens seen", f"{found['tokens']:,} in sequences of {found['sequence_length']:,}"),
        ("data id", f"`{found['data_id']}`"),
        ("tokenizer sha256", f"`{found['tokenizer_sha256']}`"),
        ("commit of the trainer", f"`{found['commit'] or 'unknown'}`"),
        ("train loss of the last update", _number(losses.get("train_loss"))),
        (f"validation loss at update {losses.get('val_step', '-')}", _number(losses.get("val_loss"))),
        ("validation bits per byte", _number(losses.get("val_bits_per_byte"))),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bitnet, "quantization: {quantization}"]
---

# {source.name}

A base language model, {sum(source.model.num_parameters().values()):,} parameters; it continues text and follows no
instructions. This export is {FORMS[form]}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("The sun", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

No code of this repository is needed or run. Transformers compiles parts of BitNet as they are first used; where there
is no C++ compiler, set `TORCHDYNAMO_DISABLE=1`. Load it in float32, as it was exported: in bfloat16 the 8-bit codes of
activations are others than those it was trained with.

A text is encoded as a document: `<s>` comes first. `</s>` ends a document and is made by the model alone; written in a
text it is text.

| where it comes from | |
|---|---|
{table}

The architecture is `BitNetForCausalLM` with `silu`: norms stand before the output and the down projection as well, and
their weights are one. Before it was named, this export was loaded by Transformers and compared with the model that was
trained: ids of hostile texts, codes and scales bitwise, logits in fp64, distributions in fp32.

**Licence.** Whoever publishes this model chooses its licence. The text it was trained on keeps its own terms (those of
FineWeb-Edu: ODC-By 1.0 and Common Crawl's terms of use), and so does the tokenizer.
"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
